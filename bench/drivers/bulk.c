/* Bulk transfers. Received bytes are discarded in the kernel (MSG_TRUNC), so that the client costs little. */
#define _GNU_SOURCE
#include "loadgen.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ACK_TIMEOUT_S = 20, SEND_SIZE = 262144, DISCARD = 4 << 20 };

int mode_down(void) {
    struct epoll_event events[64];
    int epoll_fd = epoll_create1(0), failed = 0;
    uint64_t total = 0;
    for (int i = 0; i < options.connections; i++) {
        int fd = dial(i, PORT_SOURCE, 0);
        if (fd < 0 || write_fully(fd, hellos[i % destinations], HELLO_LENGTH) || read_fully(fd, buffer, 1000)) {
            failed++;
            continue;
        }
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
    uint64_t begin = now(), end = begin + options.seconds * 1e9;
    while (now() < end && failed < options.connections) {
        int count = epoll_wait(epoll_fd, events, 64, 200);
        for (int i = 0; i < count; i++) {
            ssize_t received = recv(events[i].data.fd, buffer, DISCARD, MSG_TRUNC | MSG_DONTWAIT);
            if (received > 0) {
                total += received;
            } else if (received == 0 || errno != EAGAIN) {
                failed++;
                close(events[i].data.fd);
            }
        }
    }
    double elapsed = (now() - begin) / 1e9;
    printf("{\"mode\":\"down\",\"conc\":%d,\"bytes\":%llu,\"elapsed\":%.4f,\"gbps\":%.3f,\"err\":%d,\"client_cpu\":%.4f}\n", options.connections,
           (unsigned long long)total, elapsed, total * 8 / elapsed / 1e9, failed, cpu_seconds());
    return 0;
}

/* The sink answers the end of the stream with the count of bytes it got. */
static int acknowledged(int fd, uint64_t *count) {
    set_receive_timeout(fd, ACK_TIMEOUT_S);
    return read_fully(fd, count, sizeof *count) == 0;
}

int mode_up(void) {
    struct epoll_event events[64];
    int epoll_fd = epoll_create1(0), failed = 0, live = 0, lost = 0;
    int *fds = calloc(options.connections, sizeof *fds);
    uint64_t *sent = calloc(options.connections, sizeof *sent), total = 0, received = 0;
    for (int i = 0; i < options.connections; i++) {
        fds[i] = dial(i, PORT_SINK, 0);
        if (fds[i] < 0 || write_fully(fds[i], hellos[i % destinations], HELLO_LENGTH)) {
            failed++;
            continue;
        }
        struct epoll_event event = {.events = EPOLLOUT, .data.u32 = i};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fds[i], &event);
        live++;
    }
    usleep(100000); /* let the proxy connect before the clock starts */
    uint64_t begin = now(), end = begin + options.seconds * 1e9;
    while (now() < end && live) {
        int count = epoll_wait(epoll_fd, events, 64, 200);
        for (int i = 0; i < count; i++) {
            int k = events[i].data.u32;
            ssize_t written = send(fds[k], buffer, SEND_SIZE, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (written > 0) {
                sent[k] += written;
                total += written;
            } else if (errno != EAGAIN) {
                failed++;
                live--;
                epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fds[k], NULL);
            }
        }
    }
    double sending = (now() - begin) / 1e9;
    for (int i = 0; i < options.connections; i++)
        if (fds[i] >= 0)
            shutdown(fds[i], SHUT_WR);
    for (int i = 0; i < options.connections; i++) {
        uint64_t count = 0;
        if (fds[i] < 0)
            continue;
        if (!acknowledged(fds[i], &count)) {
            failed++;
            continue;
        }
        received += count;
        lost += count != sent[i];
    }
    double elapsed = (now() - begin) / 1e9;
    printf("{\"mode\":\"up\",\"conc\":%d,\"bytes\":%llu,\"sent\":%llu,\"sent_gbps\":%.3f,\"mismatch\":%d,\"elapsed\":%.4f,\"gbps\":%.3f,\"err\":%d,"
           "\"client_cpu\":%.4f}\n",
           options.connections, (unsigned long long)received, (unsigned long long)total, total * 8 / sending / 1e9, lost, elapsed,
           received * 8 / elapsed / 1e9, failed, cpu_seconds());
    return 0;
}
