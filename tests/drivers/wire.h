/* What server and client agree on: a connection's kind is a letter in its first bytes, and says how it goes and how it ends.
 *   A  the client asks, the server answers and ends
 *   H  the client asks and ends its direction; then the server answers and ends
 *   C  the server answers; then the client resets
 *   S  the server resets once it was asked
 *   B  the server answers with BULK_LENGTH bytes and ends
 *   G  the server answers with GIANT_LENGTH bytes and ends
 *   L  the server answers and waits for the client's end
 *   X  asks for a name that no policy allows: reset, and nothing arrives
 *   N  the client resets before it has said anything
 *   K  goes to the port above, which the kernel refuses by itself
 * It asks by a ClientHello, whose random begins with the letter, or by an HTTP request, whose path does. */
#ifndef WIRE_H
#define WIRE_H
#include "../../bench/drivers/clock.h"
#include "../../bench/drivers/hello.h"
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { KINDS = 26, BULK_LENGTH = 1 << 20, GIANT_LENGTH = 10 << 20, HELLO_KIND_AT = NOTE_OFFSET, HTTP_KIND_AT = 5, MAX_REQUEST = 1024 };
static const char ANSWER[] = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n";
enum { ANSWER_LENGTH = sizeof ANSWER - 1 };

static inline long answer_length(char kind) { return kind == 'B' ? BULK_LENGTH : kind == 'G' ? GIANT_LENGTH : ANSWER_LENGTH; }

static inline void close_by_reset(int fd) {
    struct linger linger = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close(fd);
}

/* "A":1,"B":2 of those that are not 0. */
static inline void print_by_kind(const char *name, const long *counts) {
    const char *between = "";
    printf("\"%s\":{", name);
    for (int i = 0; i < KINDS; i++)
        if (counts[i]) {
            printf("%s\"%c\":%ld", between, 'A' + i, counts[i]);
            between = ",";
        }
    printf("}");
}
#endif
