/* Load on a relay. Every connection starts with a ClientHello of 517 bytes for h<i>.bench.test. One line of JSON.
 *   loadgen conn   -c CONCURRENT -d SECONDS [-n MAX]     short connections: 100 bytes back, end of stream
 *   loadgen down   -c CONNECTIONS -d SECONDS             bulk from the origin
 *   loadgen up     -c CONNECTIONS -d SECONDS             bulk to the origin, which acknowledges the count
 *   loadgen rr     -s BYTES -d SECONDS                   ping-pong on one connection
 *   loadgen idle   -n CONNECTIONS                        open and hold until standard input ends
 *   loadgen verify -c CONCURRENT -n STREAMS -s BYTES [-r SEED]   bytes and ends of streams of random courses (verify.c)
 * -a ADDRESS (repeatable) destinations; -h NAME the name in every hello instead. */
#include "loadgen.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct options options = {.connections = 1, .maximum = 1L << 60, .size = 1, .seconds = 3};
uint8_t hellos[16][HELLO_LENGTH];
int destinations;
uint8_t buffer[1 << 20];
static struct in_addr addresses[16];

int dial(int i, int port, int nonblocking) {
    int fd = socket(AF_INET, SOCK_STREAM | (nonblocking ? SOCK_NONBLOCK : 0), 0), on = 1;
    if (fd < 0)
        return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = addresses[i % destinations]};
    if (connect(fd, (void *)&address, sizeof address) && !(nonblocking && errno == EINPROGRESS)) {
        close(fd);
        return -1;
    }
    return fd;
}

int read_fully(int fd, void *data, size_t length) {
    for (uint8_t *at = data; length;) {
        ssize_t count = recv(fd, at, length, 0);
        if (count <= 0)
            return -1;
        at += count;
        length -= count;
    }
    return 0;
}

int write_fully(int fd, const void *data, size_t length) {
    for (const uint8_t *at = data; length;) {
        ssize_t count = send(fd, at, length, MSG_NOSIGNAL);
        if (count <= 0)
            return -1;
        at += count;
        length -= count;
    }
    return 0;
}

void set_receive_timeout(int fd, int seconds) {
    struct timeval timeout = {seconds, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
}

static void add_destination(const char *address) {
    if (destinations == 16 || !inet_aton(address, &addresses[destinations])) {
        fprintf(stderr, "bad or one too many: -a %s\n", address);
        exit(2);
    }
    destinations++;
}

static void build_hellos(const char *fixed_name) {
    for (int i = 0; i < destinations; i++) {
        char name[32];
        snprintf(name, sizeof name, "h%d.bench.test", i);
        if (build_hello(hellos[i], fixed_name ? fixed_name : name) != HELLO_LENGTH)
            exit(3);
    }
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(void);
    } modes[] = {{"conn", mode_conn}, {"down", mode_down}, {"up", mode_up}, {"rr", mode_rr}, {"idle", mode_idle}, {"verify", mode_verify}};
    const char *name = NULL;
    int option;
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    options.seed = now() / 1000;
    optind = 2;
    while (argc > 1 && (option = getopt(argc, argv, "c:d:n:s:a:r:h:")) != -1)
        switch (option) {
        case 'c': options.connections = atoi(optarg); break;
        case 'd': options.seconds = atof(optarg); break;
        case 'n': options.maximum = atol(optarg); break;
        case 's': options.size = atol(optarg); break;
        case 'r': options.seed = strtoul(optarg, NULL, 0); break;
        case 'a': add_destination(optarg); break;
        case 'h': name = optarg; break;
        default: return 2;
        }
    if (!destinations)
        add_destination("192.0.2.10");
    build_hellos(name);
    for (size_t i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(argv[1], modes[i].name))
            return modes[i].run();
    fprintf(stderr, "modes: conn, down, up, rr, idle, verify\n");
    return 2;
}
