# SPDX-License-Identifier: Apache-2.0
"""The RTC's date and time registers as a number of seconds, and its alarm (MC146818A data sheet)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

# The eight time registers in the order in which they are kept here.
SECOND, MINUTE, HOUR, WEEKDAY, DAY, MONTH, YEAR, CENTURY = range(8)

DAY_SECONDS = 86_400
EPOCH_DAY = date(1970, 1, 1).toordinal()
FIRST_DAY = date.min.toordinal()
LAST_DAY = date.max.toordinal()

HOUR_PM = 0x80           # in 12-hour mode
ALARM_ANY = 0xC0         # "don't care": both top bits set


@dataclass(frozen=True, slots=True)
class Format:
    """How register B says that times are written."""

    binary: bool         # DM: binary instead of BCD
    hours24: bool        # 24/12

    def put(self, value: int) -> int:
        return value if self.binary else value // 10 << 4 | value % 10

    def get(self, byte: int) -> int | None:
        """The number in `byte`; None when it is not BCD."""
        if self.binary:
            return byte
        high, low = byte >> 4, byte & 0x0F
        return high * 10 + low if high <= 9 and low <= 9 else None

    def put_hour(self, hour: int) -> int:
        if self.hours24:
            return self.put(hour)
        return self.put((hour + 11) % 12 + 1) | (HOUR_PM if hour >= 12 else 0)

    def get_hour(self, byte: int) -> int | None:
        if self.hours24:
            hour = self.get(byte)
            return hour if hour is not None and hour < 24 else None
        hour = self.get(byte & ~HOUR_PM)
        if hour is None or not 1 <= hour <= 12:
            return None
        return hour % 12 + (12 if byte & HOUR_PM else 0)


def encode(seconds: int, weekday_shift: int, form: Format) -> list[int]:
    """The eight registers for `seconds` since 1970. Years run from 1 to 9999 and then begin again."""
    day, rest = divmod(seconds, DAY_SECONDS)
    day = (day + EPOCH_DAY - FIRST_DAY) % (LAST_DAY - FIRST_DAY + 1) + FIRST_DAY
    today = date.fromordinal(day)
    century, year = divmod(today.year, 100)
    return [
        form.put(rest % 60),
        form.put(rest // 60 % 60),
        form.put_hour(rest // 3600),
        (day + weekday_shift) % 7 + 1,   # ordinal 7 was a Sunday, and Sunday is 1
        form.put(today.day),
        form.put(today.month),
        form.put(year),
        form.put(century),
    ]


def decode(registers: list[int], form: Format) -> tuple[int, int] | None:
    """The opposite of encode(): seconds since 1970 and the weekday shift, or None when it is no date."""
    hour = form.get_hour(registers[HOUR])
    second, minute, day, month, year, century = (
        form.get(registers[i]) for i in (SECOND, MINUTE, DAY, MONTH, YEAR, CENTURY)
    )
    if hour is None or second is None or minute is None or day is None or month is None:
        return None
    if year is None or century is None or second > 59 or minute > 59 or year > 99:
        return None
    try:
        ordinal = date(century * 100 + year, month, day).toordinal()
    except ValueError:
        return None
    seconds = (ordinal - EPOCH_DAY) * DAY_SECONDS + hour * 3600 + minute * 60 + second
    # The weekday is a counter of its own: nothing makes a guest set it to the right one.
    return seconds, (registers[WEEKDAY] - 1 - ordinal) % 7


def next_alarm(seconds: int, alarm: tuple[int, int, int], form: Format) -> int | None:
    """The first moment >= `seconds` that matches the (second, minute, hour) alarm registers; None: never."""
    wanted: list[int | None] = []
    for byte, get, limit in zip(alarm, (form.get, form.get, form.get_hour), (60, 60, 24), strict=True):
        if byte & ALARM_ANY == ALARM_ANY:
            wanted.append(None)
            continue
        value = get(byte)
        if value is None or value >= limit:
            return None
        wanted.append(value)
    second, minute, hour = wanted
    midnight = seconds - seconds % DAY_SECONDS
    start = seconds % DAY_SECONDS // 60
    for m in range(start, start + 24 * 60 + 1):
        if minute not in (None, m % 60) or hour not in (None, m // 60 % 24):
            continue
        lowest = seconds % 60 if m == start else 0
        if second is None:
            return midnight + m * 60 + lowest
        if second >= lowest:
            return midnight + m * 60 + second
    return None
