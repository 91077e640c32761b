/* origin [ADDRESS]: the server of all scenarios; one thread, one epoll. Every connection must begin with a hello of 517 bytes.
 *   443   100 bytes back, end of stream
 *   5001  sink; answers the end of the stream with the count of bytes (8 bytes, native order)
 *   5002  source of bytes until the peer goes away
 *   5003  echo; answers the end of the stream with the end of its own
 *   5004  100 bytes back, then holds the connection open
 *   5005  the server's end of a stream of verify (stream.h); the hello's note says which
 *   5006  a byte for each stream of the note's seed: the verdict of the server's end */
#define _GNU_SOURCE
#include "clock.h"
#include "hello.h"
#include "stream.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum kind { REPLY, SINK, SOURCE, ECHO, HOLD, STREAM, REPORT, KINDS };
static const int ports[KINDS] = {443, 5001, 5002, 5003, 5004, 5005, 5006};
enum { ECHO_SIZE = 65536, STEPS_PER_TURN = 16, ECHO_STEPS_PER_TURN = 64, ACCEPTS_PER_EVENT = 256, BACKLOG = 4096, MAX_STREAMS = 16000, DISCARD = 4 << 20 };
static const uint32_t GONE = EPOLLRDHUP | EPOLLHUP | EPOLLERR;

struct connection {
    int fd, is_listener, hello_left;
    enum kind kind;
    uint32_t events;
    uint64_t received;
    uint8_t *echo; /* bytes echo_at to echo_length are still to be sent */
    int echo_at, echo_length;
    uint8_t hello[HELLO_LENGTH];
    struct end *end;
};

static int epoll_fd;
static uint8_t block[262144];
static char reply[100];
static uint8_t verdicts[MAX_STREAMS]; /* of the run of verify with this seed */
static uint32_t seed;

static void watch(struct connection *connection, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (operation == EPOLL_CTL_MOD && connection->events == events)
        return;
    epoll_ctl(epoll_fd, operation, connection->fd, &event);
    connection->events = events;
}

static void finish(struct connection *connection) {
    if (connection->fd >= 0)
        close(connection->fd);
    free(connection->echo);
    free(connection->end);
    free(connection);
}

static void serve_sink(struct connection *connection) {
    for (int i = 0; i < STEPS_PER_TURN; i++) {
        ssize_t count = recv(connection->fd, block, DISCARD, MSG_TRUNC);
        if (count > 0) {
            connection->received += count;
            continue;
        }
        if (count < 0 && errno == EAGAIN)
            return;
        if (count == 0)
            send(connection->fd, &connection->received, sizeof connection->received, MSG_NOSIGNAL);
        finish(connection);
        return;
    }
}

static void serve_source(struct connection *connection, uint32_t events) {
    ssize_t count = 0;
    for (int i = 0; i < STEPS_PER_TURN && count >= 0; i++)
        count = send(connection->fd, block, sizeof block, MSG_NOSIGNAL);
    if (events & GONE || (count < 0 && errno != EAGAIN))
        finish(connection);
}

static void serve_echo(struct connection *connection) {
    if (!connection->echo)
        connection->echo = malloc(ECHO_SIZE);
    for (int i = 0; i < ECHO_STEPS_PER_TURN; i++) {
        if (connection->echo_at == connection->echo_length) {
            ssize_t count = recv(connection->fd, connection->echo, ECHO_SIZE, 0);
            if (count < 0 && errno == EAGAIN) {
                watch(connection, EPOLL_CTL_MOD, EPOLLIN);
                return;
            }
            if (count <= 0) {
                finish(connection);
                return;
            }
            connection->echo_length = count;
            connection->echo_at = 0;
        }
        int left = connection->echo_length - connection->echo_at;
        ssize_t sent = send(connection->fd, connection->echo + connection->echo_at, left, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            watch(connection, EPOLL_CTL_MOD, EPOLLOUT);
            return;
        }
        if (sent < 0) {
            finish(connection);
            return;
        }
        connection->echo_at += sent;
    }
    watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT); /* the turn is over, the work is not */
}

static void serve_held(struct connection *connection) {
    ssize_t count = recv(connection->fd, block, sizeof block, 0);
    if (count == 0 || (count < 0 && errno != EAGAIN))
        finish(connection);
}

static struct note note_of(const struct connection *connection) {
    struct note note;
    memcpy(&note, connection->hello + NOTE_OFFSET, sizeof note);
    if (note.streams > MAX_STREAMS || note.id >= MAX_STREAMS)
        exit(2);
    if (note.seed != seed)
        memset(verdicts, UNFINISHED, sizeof verdicts);
    seed = note.seed;
    return note;
}

static void serve_report(struct connection *connection) {
    struct note note = note_of(connection);
    send(connection->fd, verdicts, note.streams, MSG_NOSIGNAL);
    finish(connection);
}

static void serve_stream(struct connection *connection, uint32_t events) {
    struct note note = note_of(connection);
    if (!connection->end) {
        connection->end = malloc(sizeof *connection->end);
        end_open(connection->end, &note, SERVER, connection->fd);
    }
    end_serve(connection->end, events);
    if (connection->end->finished) {
        verdicts[note.id] = end_verdict(connection->end);
        connection->fd = -1; /* the end has closed it */
        finish(connection);
    } else {
        watch(connection, EPOLL_CTL_MOD, end_interest(connection->end));
    }
}

/* 1 once the whole hello was read and the connection is to be served on. */
static int read_hello(struct connection *connection, uint32_t events) {
    while (connection->hello_left) {
        ssize_t count = recv(connection->fd, connection->hello + HELLO_LENGTH - connection->hello_left, connection->hello_left, 0);
        if (count < 0 && errno == EAGAIN && !(events & EPOLLERR))
            return 0;
        if (count <= 0) {
            finish(connection);
            return 0;
        }
        connection->hello_left -= count;
        if (connection->hello_left)
            continue;
        if (connection->kind == REPLY || connection->kind == HOLD)
            send(connection->fd, reply, sizeof reply, MSG_NOSIGNAL);
        if (connection->kind == REPLY) {
            finish(connection);
            return 0;
        }
        if (connection->kind == HOLD)
            return 0;
        if (connection->kind == SOURCE)
            watch(connection, EPOLL_CTL_MOD, EPOLLOUT | EPOLLRDHUP);
    }
    return 1;
}

static void serve(struct connection *connection, uint32_t events) {
    if (!read_hello(connection, events))
        return;
    switch (connection->kind) {
    case SINK: serve_sink(connection); return;
    case SOURCE: serve_source(connection, events); return;
    case HOLD: serve_held(connection); return;
    case STREAM: serve_stream(connection, events); return;
    case REPORT: serve_report(connection); return;
    default: serve_echo(connection); return;
    }
}

static void accept_connections(struct connection *listener) {
    for (int i = 0; i < ACCEPTS_PER_EVENT; i++) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK), on = 1;
        if (fd < 0)
            return;
        struct connection *connection = calloc(1, sizeof *connection);
        connection->fd = fd;
        connection->kind = listener->kind;
        connection->hello_left = HELLO_LENGTH;
        if (connection->kind >= ECHO)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(connection, EPOLL_CTL_ADD, EPOLLIN);
        if (connection->kind == REPLY)
            serve(connection, 0); /* the hello is often there already */
    }
}

static void listen_on(struct in_addr local, enum kind kind, struct connection *listener) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(ports[kind]), .sin_addr = local};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (void *)&address, sizeof address) || listen(fd, BACKLOG)) {
        perror("origin");
        exit(1);
    }
    *listener = (struct connection){.fd = fd, .is_listener = 1, .kind = kind};
    watch(listener, EPOLL_CTL_ADD, EPOLLIN);
}

int main(int argc, char **argv) {
    struct in_addr local = {.s_addr = INADDR_ANY};
    static struct connection listeners[KINDS];
    struct epoll_event events[512];
    if (argc > 1 && !inet_aton(argv[1], &local)) {
        fprintf(stderr, "origin: %s is no address\n", argv[1]);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    memset(reply, 'R', sizeof reply);
    for (unsigned i = 0; i < sizeof block; i++)
        block[i] = i * 31;
    epoll_fd = epoll_create1(0);
    for (enum kind kind = 0; kind < KINDS; kind++)
        listen_on(local, kind, &listeners[kind]);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 512, -1);
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (connection->is_listener)
                accept_connections(connection);
            else
                serve(connection, events[i].events);
        }
    }
}
