/* server PORT: plays the server's part of every kind (wire.h) on all addresses of both families; one thread, one epoll.
 * For each line on its standard input it prints a line of JSON: connections accepted and live, by kind those that asked and those that
 * went and ended as their kind says. It ends with its input. */
#define _GNU_SOURCE
#include "wire.h"
#include <errno.h>
#include <signal.h>

enum { ACCEPTS_PER_EVENT = 256, BACKLOG = 65535 };

struct connection {
    int fd, is_listener;
    char kind; /* 0: not known yet */
    int length, ended;
    long sent;
    uint8_t request[MAX_REQUEST];
};

static int epoll_fd;
static long accepted, live, asked[KINDS], right[KINDS];
static uint8_t block[1 << 18];

static void watch(struct connection *connection, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    epoll_ctl(epoll_fd, operation, connection->fd, &event);
}

static void finish(struct connection *connection, int as_it_should) {
    if (connection->kind)
        right[connection->kind - 'A'] += as_it_should;
    if (connection->kind == 'S' && as_it_should)
        close_by_reset(connection->fd);
    else
        close(connection->fd);
    live--;
    free(connection);
}

/* Sends what it can; whether all of the answer is sent. -1: it failed. */
static int answer(struct connection *connection) {
    long length = answer_length(connection->kind);
    while (connection->sent < length) {
        const void *from = length == ANSWER_LENGTH ? (const void *)(ANSWER + connection->sent) : block;
        size_t left = length - connection->sent;
        ssize_t sent = send(connection->fd, from, left < sizeof block ? left : sizeof block, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            return 0;
        if (sent < 0)
            return -1;
        connection->sent += sent;
    }
    return 1;
}

static char kind_of(const struct connection *connection) {
    const uint8_t *request = connection->request;
    char kind = 0;
    if (request[0] == 0x16 && connection->length >= HELLO_LENGTH)
        kind = request[HELLO_KIND_AT];
    else if (request[0] == 'G' && connection->length > 8 && !memcmp(request + connection->length - 4, "\r\n\r\n", 4))
        kind = request[HTTP_KIND_AT];
    return kind >= 'A' && kind <= 'Z' ? kind : 0;
}

static void serve(struct connection *connection, uint32_t events) {
    int error = 0;
    while (!connection->ended) {
        uint8_t rest[64];
        int room = MAX_REQUEST - connection->length;
        void *into = room && !connection->kind ? connection->request + connection->length : rest;
        ssize_t count = recv(connection->fd, into, into == rest ? sizeof rest : (size_t)room, 0);
        if (count < 0 && errno == EAGAIN)
            break;
        if (count < 0)
            error = errno;
        if (count <= 0)
            connection->ended = 1;
        else if (into != rest)
            connection->length += count;
        if (!connection->kind && (connection->kind = kind_of(connection)))
            asked[connection->kind - 'A']++;
    }
    if (!connection->kind) {
        if (connection->ended)
            finish(connection, 0);
        return;
    }
    if (connection->kind == 'S') {
        finish(connection, !connection->ended);
        return;
    }
    if (error || events & EPOLLERR) {
        finish(connection, (connection->kind == 'C' || connection->kind == 'L') && connection->sent == ANSWER_LENGTH);
        return;
    }
    if (connection->kind == 'H' && !connection->ended)
        return;
    int sent = answer(connection);
    if (sent < 0)
        finish(connection, 0);
    else if (!sent)
        watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
    else if (connection->kind != 'C' && connection->kind != 'L')
        finish(connection, 1);
    else if (connection->ended)
        finish(connection, connection->kind == 'L'); /* an end where a reset was sent is wrong */
}

static void accept_connections(struct connection *listener) {
    for (int i = 0; i < ACCEPTS_PER_EVENT; i++) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK);
        if (fd < 0)
            return;
        struct connection *connection = calloc(1, sizeof *connection);
        connection->fd = fd;
        accepted++;
        live++;
        watch(connection, EPOLL_CTL_ADD, EPOLLIN | EPOLLRDHUP | EPOLLET);
    }
}

static void listen_on(int family, int port, struct connection *listener) {
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    if (bind(fd, family == AF_INET ? (void *)&v4 : (void *)&v6, family == AF_INET ? sizeof v4 : sizeof v6) || listen(fd, BACKLOG)) {
        perror("server");
        exit(1);
    }
    *listener = (struct connection){.fd = fd, .is_listener = 1};
    watch(listener, EPOLL_CTL_ADD, EPOLLIN);
}

static void tell(void) {
    char line[64];
    if (read(0, line, sizeof line) <= 0)
        exit(0);
    printf("{\"accepted\":%ld,\"live\":%ld,", accepted, live);
    print_by_kind("asked", asked);
    printf(",");
    print_by_kind("right", right);
    printf("}\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    static struct connection listeners[2], input;
    struct epoll_event events[512];
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    epoll_fd = epoll_create1(0);
    listen_on(AF_INET, atoi(argv[argc - 1]), &listeners[0]);
    listen_on(AF_INET6, atoi(argv[argc - 1]), &listeners[1]);
    watch(&input, EPOLL_CTL_ADD, EPOLLIN);
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (connection == &input)
                tell();
            else if (connection->is_listener)
                accept_connections(connection);
            else
                serve(connection, events[i].events);
        }
    }
}
