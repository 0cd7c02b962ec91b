/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest's end of test_virtio_guest_vsock.py:  connect PORT < data   sends standard input to the host and prints the
 * answer;  listen PORT   sends what one client says back to it.
 */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char data[65536];

static void copy(int from, int to)
{
    for (ssize_t n; (n = read(from, data, sizeof(data))) > 0;)
        for (ssize_t at = 0, m; at < n; at += m)
            if ((m = write(to, data + at, n - at)) <= 0)
                exit(3);
}

int main(int argc, char **argv)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = argc > 2 ? atoi(argv[2]) : 0};
    int s = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (s < 0 || argc < 3)
        return 2;
    if (!strcmp(argv[1], "connect")) {
        address.svm_cid = VMADDR_CID_HOST;
        if (connect(s, (struct sockaddr *)&address, sizeof(address)))
            return 4;
        copy(0, s);
        shutdown(s, SHUT_WR);
        copy(s, 1);
        return 0;
    }
    address.svm_cid = VMADDR_CID_ANY;
    if (bind(s, (struct sockaddr *)&address, sizeof(address)) || listen(s, 1))
        return 5;
    puts("guest listens");
    fflush(stdout);
    int client = accept(s, NULL, NULL);
    copy(client, client);
    return 0;
}
