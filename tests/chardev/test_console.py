# SPDX-License-Identifier: Apache-2.0
"""The console in memory."""

import asyncio
import re
import threading

import pytest

from kvmpy.chardev import Console, Found


@pytest.fixture
def console():
    return Console()


def later(*actions):
    """Do the actions in another thread."""

    def run():
        for action in actions:
            action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_expect_reads_past_the_match(console):
    console.write(b"boot\r\nlogin: root\r\nlogin: ")
    assert console.expect("login: ") == Found("boot\r\n", "login: ")
    assert console.expect(b"login: ") == Found("root\r\n", "login: ")
    assert console.read() == ""


def test_plain_text_is_no_expression(console):
    console.write(b"a+b [ok]")
    assert console.expect("[ok]").before == "a+b "


@pytest.mark.parametrize("pattern", [re.compile(r"(\w+)@(\w+)?:"), re.compile(rb"(\w+)@(\w+)?:")])
def test_expressions_of_text_and_bytes_with_groups(console, pattern):
    console.write("grüße me@: $".encode())
    assert console.expect(pattern) == Found("grüße ", "me@:", ("me", None))


def test_expression_flags_are_kept(console):
    console.write(b"x\nPANIC\n")
    assert console.expect(re.compile("^panic$", re.I | re.M)).text == "PANIC"


def test_expect_waits_for_a_pattern_that_comes_in_pieces(console):
    thread = later(*(lambda byte=byte: console.write(bytes([byte])) for byte in b"noise login: "))
    assert console.expect("login: ", timeout=60) == Found("noise ", "login: ")
    thread.join()


def test_a_character_that_comes_in_two_pieces_is_whole(console):
    first, second = "é".encode()[:1], "é".encode()[1:]
    console.write(first)
    with pytest.raises(TimeoutError):
        console.expect("é", timeout=0)
    console.write(second)
    assert console.expect("é").text == "é"


def test_timeout_says_what_was_expected_and_what_came(console):
    console.write(b"Kernel panic - not syncing\n")
    with pytest.raises(TimeoutError, match=r"(?s)'login:' did not appear within 0 s; .*Kernel panic - not"):
        console.expect("login:", timeout=0)
    assert console.expect("panic").before == "Kernel "


def test_timeout_with_no_output_at_all(console):
    with pytest.raises(TimeoutError, match=r"'x\+' did not .* no output at all"):
        console.expect(re.compile("x+"), timeout=0.01)


def test_close_ends_a_wait_with_the_tail_of_the_output(console):
    console.write(b"last words")
    thread = later(console.close)
    with pytest.raises(EOFError, match=r"(?s)before 'login' appeared.*last words"):
        console.expect("login", timeout=60)
    thread.join()
    assert console.closed
    assert console.expect("last").text == "last"  # what was kept can still be read


def test_read_until_and_read(console):
    console.write(b"one\ntwo\nthree")
    assert console.read_until("\n") == "one\n"
    assert console.read() == "two\nthree"
    assert console.read() == ""


def test_transcript_and_lines_do_not_move_reading(console):
    console.write(b"one\r\ntwo\nthr")
    assert console.transcript == "one\r\ntwo\nthr"
    assert console.lines == ["one", "two", "thr"]
    assert console.raw == b"one\r\ntwo\nthr"
    assert console.read() == "one\r\ntwo\nthr"


def test_bytes_that_are_no_text_are_shown_as_such(console):
    console.write(b"\xff\xfeok")
    assert console.expect("ok").before == "\ufffd\ufffd"


def test_only_the_limit_is_kept():
    console = Console(limit=100)
    for i in range(1000):
        console.write(b"%03d\n" % i)
    assert len(console.raw) <= 125
    assert console.raw.endswith(b"998\n999\n")
    assert console.expect("999").text == "999"
    with pytest.raises(ValueError, match="not 0"):
        Console(limit=0)


def test_a_wait_survives_forgetting():
    console = Console(limit=64)
    thread = later(*[lambda: console.write(b"." * 50)] * 50, lambda: console.write(b"login: "))
    assert console.expect("login: ", timeout=60).text == "login: "
    thread.join()


def test_typing_reaches_the_receiver_and_waits_for_it(console):
    got = bytearray()
    console.send("ls")
    console.attach(got.extend)
    console.send_line(b" -l")
    console.send_line()
    assert got == b"ls -l\r\r"


def test_several_waiters_each_find_theirs(console):
    found = []
    threads = [
        threading.Thread(target=lambda word=word: found.append(console.expect(word, timeout=60).text))
        for word in ("alpha", "beta")
    ]
    for thread in threads:
        thread.start()
    console.write(b"alpha ")
    while len(found) < 1:
        threads[0].join(0.01)
    console.write(b"beta ")
    for thread in threads:
        thread.join()
    assert found == ["alpha", "beta"]


# -- asyncio


def test_aexpect_lets_other_tasks_run(console):
    async def main():
        order = []

        async def reader():
            order.append((await console.aexpect(re.compile(r"(\d+) ready"), timeout=60)).groups)

        async def writer():
            for byte in b"boot 42 ready\n":
                order.append(byte)
                console.write(bytes([byte]))
                await asyncio.sleep(0)

        await asyncio.gather(reader(), writer())
        return order

    order = asyncio.run(main())
    assert order[:2] == list(b"bo")
    assert ("42",) in order


def test_aexpect_hears_other_threads(console):
    async def main():
        thread = later(lambda: console.write(b"from a thread"))
        found = await console.aexpect("thread", timeout=60)
        thread.join()
        return found

    assert asyncio.run(main()) == Found("from a ", "thread")
    assert console._listeners == set()


def test_aread_until(console):
    console.write(b"one\ntwo\n")
    assert asyncio.run(console.aread_until("\n")) == "one\n"
    assert console.read() == "two\n"


def test_aexpect_times_out_and_can_be_cancelled(console):
    async def main():
        console.write(b"hello")
        with pytest.raises(TimeoutError, match=r"'login' did not appear within 0.01 s; .*\nhello"):
            await console.aexpect("login", timeout=0.01)
        task = asyncio.create_task(console.aexpect("login", timeout=None))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert console._listeners == set()


def test_aexpect_ends_when_the_console_closes(console):
    async def main():
        thread = later(console.close)
        with pytest.raises(EOFError, match="'login'"):
            await console.aexpect("login", timeout=60)
        thread.join()

    asyncio.run(main())
