/* Many connections that do nothing: what one costs in memory. The caller measures between READY and the end of our input. */
#include "loadgen.h"
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { REPLY_LENGTH = 100, IN_FLIGHT = 100, TIMEOUT_S = 5 };

int mode_idle(void) {
    long opened = 0, failed = 0;
    int *fds = calloc(options.maximum, sizeof *fds);
    uint64_t begin = now();
    for (long first = 0; first < options.maximum; first += IN_FLIGHT) {
        long after = first + IN_FLIGHT < options.maximum ? first + IN_FLIGHT : options.maximum;
        for (long i = first; i < after; i++) {
            fds[i] = dial(i, PORT_HOLD, 0);
            if (fds[i] >= 0)
                write_fully(fds[i], hellos[i % destinations], HELLO_LENGTH);
        }
        for (long i = first; i < after; i++) {
            if (fds[i] >= 0)
                set_receive_timeout(fds[i], TIMEOUT_S);
            if (fds[i] >= 0 && !read_fully(fds[i], buffer, REPLY_LENGTH))
                opened++;
            else
                failed++;
        }
    }
    printf("READY %ld %ld %.3f\n", opened, failed, (now() - begin) / 1e9);
    fflush(stdout);
    while (read(0, buffer, sizeof buffer) > 0)
        ;
    return 0;
}
