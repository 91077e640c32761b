/* Ping-pong of a fixed size on one established connection: the latency that a relay adds. */
#include "loadgen.h"
#include <stdio.h>
#include <unistd.h>

enum { WARM_UP = 300, TIMEOUT_S = 5 };

static int round_trip(int fd) { return write_fully(fd, buffer, options.size) || read_fully(fd, buffer, options.size); }

int mode_rr(void) {
    int fd = dial(0, PORT_ECHO, 0);
    long done = 0, failed = 0;
    if (fd < 0) {
        printf("{\"mode\":\"rr\",\"err\":1}\n");
        return 1;
    }
    set_receive_timeout(fd, TIMEOUT_S);
    write_fully(fd, hellos[0], HELLO_LENGTH);
    usleep(100000); /* Squid refuses bytes that follow the hello at once */
    for (int i = 0; i < WARM_UP && !failed; i++)
        failed += round_trip(fd);
    double cpu = cpu_seconds();
    uint64_t begin = now(), end = begin + options.seconds * 1e9, last = begin;
    while (!failed && last < end && done < options.maximum) {
        if (round_trip(fd)) {
            failed++;
            break;
        }
        uint64_t then = last;
        last = now();
        record(last - then);
        done++;
    }
    double elapsed = (last - begin) / 1e9;
    printf("{\"mode\":\"rr\",\"size\":%ld,\"done\":%ld,\"err\":%ld,\"elapsed\":%.4f,\"rate\":%.1f,\"p50_us\":%.2f,\"p99_us\":%.2f,\"p999_us\":%.2f,"
           "\"max_us\":%.1f,\"client_cpu\":%.4f}\n",
           options.size, done, failed, elapsed, done ? done / elapsed : 0, percentile_us(50), percentile_us(99), percentile_us(99.9), longest / 1000.0,
           cpu_seconds() - cpu);
    return 0;
}
