/* Short connections: connect, hello, 100 bytes back, end of stream; the next one at once. */
#include "loadgen.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { REPLY_LENGTH = 100, GRACE_S = 3 };

struct slot {
    int fd, connected, received;
    long id;
    uint64_t started;
};

static int epoll_fd, live;
static long started, done, failed_connect, failed_io, short_reply;
static uint64_t begin, end, last_done;

static void start(struct slot *slot) {
    if (now() >= end || started >= options.maximum)
        return;
    *slot = (struct slot){.id = started++, .started = now()};
    slot->fd = dial(slot->id, PORT_REPLY, 1);
    if (slot->fd < 0) {
        failed_connect++;
        usleep(200);
        return;
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = slot};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, slot->fd, &event);
    live++;
}

static void next(struct slot *slot, long *counter) {
    (*counter)++;
    close(slot->fd);
    slot->fd = -1;
    live--;
    start(slot);
}

static void send_hello(struct slot *slot, uint32_t events) {
    if (events & (EPOLLERR | EPOLLHUP)) {
        next(slot, &failed_connect);
    } else if (events & EPOLLOUT) {
        slot->connected = 1;
        if (send(slot->fd, hellos[slot->id % destinations], HELLO_LENGTH, MSG_NOSIGNAL) != HELLO_LENGTH)
            next(slot, &failed_io);
    }
}

static void receive(struct slot *slot) {
    for (;;) {
        ssize_t count = recv(slot->fd, buffer, sizeof buffer, 0);
        if (count > 0) {
            slot->received += count;
            continue;
        }
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0) {
            next(slot, &failed_io);
        } else if (slot->received != REPLY_LENGTH) {
            next(slot, &short_reply);
        } else {
            last_done = now();
            record(last_done - slot->started);
            next(slot, &done);
        }
        return;
    }
}

int mode_conn(void) {
    struct slot *slots = calloc(options.connections, sizeof *slots);
    struct epoll_event events[256];
    epoll_fd = epoll_create1(0);
    begin = last_done = now();
    end = begin + options.seconds * 1e9;
    for (int i = 0; i < options.connections; i++)
        slots[i].fd = -1;
    while (now() < end + GRACE_S * 1000000000ull) {
        if (!live && (now() >= end || started >= options.maximum))
            break;
        for (int i = 0; i < options.connections; i++)
            if (slots[i].fd < 0)
                start(&slots[i]);
        int count = epoll_wait(epoll_fd, events, 256, 100);
        for (int i = 0; i < count; i++) {
            struct slot *slot = events[i].data.ptr;
            if (slot->fd >= 0 && !slot->connected)
                send_hello(slot, events[i].events);
            else if (slot->fd >= 0)
                receive(slot);
        }
    }
    double elapsed = (last_done - begin) / 1e9;
    if (elapsed < options.seconds)
        elapsed = options.seconds;
    printf("{\"mode\":\"conn\",\"conc\":%d,\"done\":%ld,\"err\":%ld,\"e_conn\":%ld,\"e_io\":%ld,\"e_short\":%ld,\"stuck\":%d,"
           "\"elapsed\":%.4f,\"rate\":%.1f,\"p50_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,\"max_us\":%.1f,\"client_cpu\":%.4f}\n",
           options.connections, done, failed_connect + failed_io + short_reply, failed_connect, failed_io, short_reply, live, elapsed,
           done / elapsed, percentile_us(50), percentile_us(99), percentile_us(99.9), longest / 1000.0, cpu_seconds());
    return 0;
}
