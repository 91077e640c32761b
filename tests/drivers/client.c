/* client OPTIONS ADDRESS...: plays the client's part of every kind (wire.h), from all of its slots at once; one thread, one epoll.
 *   -m KINDS    letters, one drawn for each connection: AAAC is three of A to one of C
 *   -n COUNT    connections in all        -d SECONDS  or until then
 *   -c SLOTS    connections at one time   -r RATE     new ones a second; 0: as fast as they go
 *   -p PORT     -s SEED                   -w SECONDS  patience: longer without an end is "silence"
 *   -u          never read                -t          ask by one byte a second, and never finish
 *   -q          never ask                 -k          close without waiting for an answer to the SYN
 *   -H          keep what is open until standard input ends
 * After each second it prints PROGRESS ENDED; with -H, HELD once all slots are connected (of kind L: answered).
 * Last a line of JSON: started, by kind those that went as their kind says, what else became of how many ("A ECONNRESET"), and
 * microseconds from connect() to the first byte of an answer. */
#define _GNU_SOURCE
#include "wire.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>

enum { MAX_ADDRESSES = 16, MAX_WRONG = 64 };

struct slot {
    int fd, connected, answered, dripped;
    char kind;
    long received;
    uint64_t started;
    uint32_t number;
};

static struct {
    const char *mix;
    long count;
    int slots, port, addresses;
    double seconds, rate, patience;
    int unread, drip, quiet, careless, hold;
} options = {.mix = "A", .count = 1L << 60, .slots = 1, .port = 80, .seconds = 3600, .patience = 20};
static struct sockaddr_in6 addresses[MAX_ADDRESSES];
static struct slot *slots;
static int *unused, unused_count; /* slots without a connection */
static int epoll_fd, stopping;
static long started, ended, connected_now, answered_now, right[KINDS];
static struct {
    char kind;
    const char *how;
    long count;
} wrong[MAX_WRONG];
static uint64_t random_state, begin;
static uint8_t buffer[1 << 18];
static const char DRIP[] = "GET /A HTTP/1.1\r\nHost: drip.site.example\r\nX: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

static uint32_t draw(void) { /* splitmix64 */
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z >> 32;
}

static void note_wrong(char kind, const char *how) {
    int i = 0;
    while (i < MAX_WRONG - 1 && wrong[i].how && (wrong[i].kind != kind || strcmp(wrong[i].how, how)))
        i++;
    wrong[i].kind = kind;
    wrong[i].how = how;
    wrong[i].count++;
}

/* how: NULL, as its kind says; else what happened instead. */
static void finish(struct slot *slot, const char *how, int by_reset) {
    if (how)
        note_wrong(slot->kind, how);
    else
        right[slot->kind - 'A']++;
    if (by_reset)
        close_by_reset(slot->fd);
    else
        close(slot->fd);
    connected_now -= slot->connected;
    answered_now -= slot->answered;
    slot->fd = -1;
    ended++;
    unused[unused_count++] = slot - slots;
}

static void failed(struct slot *slot, int error) {
    int expected = (error == ECONNREFUSED && slot->kind == 'K') || (error == ECONNRESET && (slot->kind == 'S' || slot->kind == 'X'));
    if (slot->kind == 'L' && error == ECONNRESET && options.hold)
        expected = slot->answered;
    finish(slot, expected ? NULL : strerrorname_np(error), 0);
}

static void start(struct slot *slot) {
    const struct sockaddr_in6 *to = &addresses[draw() % options.addresses];
    struct sockaddr_in6 address = *to;
    int on = 1, small = 4096;
    *slot = (struct slot){.number = draw(), .kind = options.mix[draw() % strlen(options.mix)]};
    address.sin6_port = htons(options.port + (slot->kind == 'K')); /* both families have the port at the same place */
    slot->fd = socket(to->sin6_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
    started++;
    setsockopt(slot->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (options.unread)
        setsockopt(slot->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    slot->started = now();
    socklen_t length = to->sin6_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof address;
    if (slot->fd < 0 || (connect(slot->fd, (void *)&address, length) && errno != EINPROGRESS)) {
        failed(slot, errno);
        return;
    }
    if (options.careless) {
        finish(slot, NULL, 0);
        return;
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = slot};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, slot->fd, &event);
}

/* Ask by a ClientHello or by an HTTP request, for one of many names, in one piece or two. */
static void ask(struct slot *slot) {
    static uint8_t request[MAX_REQUEST];
    char name[64];
    int length;
    snprintf(name, sizeof name, "n%u.%s.example", slot->number % 5000, slot->kind == 'X' ? "blocked" : "site");
    if (slot->number & 0x10000 || slot->kind == 'B' || slot->kind == 'G') {
        length = build_hello(request, name);
        request[HELLO_KIND_AT] = slot->kind;
    } else {
        length = snprintf((char *)request, sizeof request, "GET /%c HTTP/1.1\r\nHost: %s\r\nX-Number: %u\r\n\r\n", slot->kind, name, slot->number);
    }
    int first = slot->number & 0x700000 ? length : length / 2;
    if (send(slot->fd, request, first, MSG_NOSIGNAL) != first ||
        (first < length && send(slot->fd, request + first, length - first, MSG_NOSIGNAL) != length - first)) {
        failed(slot, errno);
        return;
    }
    if (slot->kind == 'H')
        shutdown(slot->fd, SHUT_WR);
}

static void on_connected(struct slot *slot) {
    slot->connected = 1;
    connected_now++;
    if (slot->kind == 'K')
        finish(slot, "passed", 1);
    else if (slot->kind == 'N')
        finish(slot, NULL, 1);
    else if (!options.drip && !options.quiet)
        ask(slot);
}

static void on_end(struct slot *slot) {
    int whole = slot->received == answer_length(slot->kind) && strchr("AHBG", slot->kind);
    finish(slot, whole ? NULL : slot->received ? "cut short" : "ended", 0);
}

static void receive(struct slot *slot) {
    for (;;) {
        ssize_t count = recv(slot->fd, buffer, sizeof buffer, 0);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0) {
            failed(slot, errno);
            return;
        }
        if (count == 0) {
            on_end(slot);
            return;
        }
        if (!slot->received)
            record(now() - slot->started);
        slot->received += count;
        if (slot->kind == 'C' && slot->received == ANSWER_LENGTH) {
            finish(slot, NULL, 1);
            return;
        }
        if (slot->kind == 'X') {
            finish(slot, "passed", 1);
            return;
        }
        if (slot->kind == 'L' && !slot->answered) {
            slot->answered = 1;
            answered_now++;
        }
    }
}

static void on_event(struct slot *slot, uint32_t events) {
    if (slot->fd < 0)
        return;
    if (!slot->connected) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(slot->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) {
            failed(slot, error);
            return;
        }
        if (!(events & EPOLLOUT))
            return;
        on_connected(slot);
        if (slot->fd < 0)
            return;
    }
    if (options.unread && !(events & (EPOLLERR | EPOLLHUP)))
        return;
    if (events & (EPOLLIN | EPOLLERR | EPOLLHUP))
        receive(slot);
}

static void look_at_clocks(void) {
    uint64_t time = now();
    for (int i = 0; i < options.slots; i++) {
        struct slot *slot = &slots[i];
        if (slot->fd < 0)
            continue;
        if (!options.hold && time - slot->started > options.patience * 1e9) {
            finish(slot, "silence", 1);
        } else if (options.drip && slot->connected) {
            ssize_t sent = send(slot->fd, DRIP + slot->dripped, 1, MSG_NOSIGNAL);
            if (sent == 1 && slot->dripped + 2 < (int)sizeof DRIP)
                slot->dripped++;
        }
    }
}

static void start_more(void) {
    double elapsed = (now() - begin) / 1e9;
    long due = options.rate ? (long)(elapsed * options.rate) : options.count;
    if (stopping || elapsed > options.seconds)
        return;
    for (int i = 0; i < 256 && unused_count && started < options.count && started < due; i++)
        start(&slots[unused[--unused_count]]);
}

static int all_done(void) {
    int nothing_more = started >= options.count || stopping || (now() - begin) / 1e9 > options.seconds;
    return nothing_more && (options.hold ? stopping || unused_count == options.slots : unused_count == options.slots);
}

static void add_address(const char *text) {
    struct sockaddr_in6 *to = &addresses[options.addresses++ % MAX_ADDRESSES];
    struct sockaddr_in *v4 = (void *)to;
    if (inet_pton(AF_INET6, text, &to->sin6_addr) == 1) {
        to->sin6_family = AF_INET6;
    } else {
        v4->sin_family = AF_INET;
        if (inet_pton(AF_INET, text, &v4->sin_addr) != 1)
            exit(2);
    }
}

static void parse(int argc, char **argv) {
    for (int option; (option = getopt(argc, argv, "m:n:d:c:r:p:s:w:utqkH")) != -1;)
        switch (option) {
        case 'm': options.mix = optarg; break;
        case 'n': options.count = atol(optarg); break;
        case 'd': options.seconds = atof(optarg); break;
        case 'c': options.slots = atoi(optarg); break;
        case 'r': options.rate = atof(optarg); break;
        case 'p': options.port = atoi(optarg); break;
        case 's': random_state = strtoull(optarg, NULL, 0); break;
        case 'w': options.patience = atof(optarg); break;
        case 'u': options.unread = 1; break;
        case 't': options.drip = 1; break;
        case 'q': options.quiet = 1; break;
        case 'k': options.careless = 1; break;
        case 'H': options.hold = 1; break;
        default: exit(2);
        }
    while (optind < argc)
        add_address(argv[optind++]);
    if (!options.addresses || options.addresses > MAX_ADDRESSES)
        exit(2);
}

static void tell(void) {
    const char *between = "";
    printf("{\"started\":%ld,\"ended\":%ld,", started, ended);
    print_by_kind("right", right);
    printf(",\"wrong\":{");
    for (int i = 0; i < MAX_WRONG && wrong[i].how; i++) {
        printf("%s\"%c %s\":%ld", between, wrong[i].kind, wrong[i].how, wrong[i].count);
        between = ",";
    }
    printf("},\"seconds\":%.3f,\"answers\":%lu,\"p50_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f}\n", (now() - begin) / 1e9, (unsigned long)recorded,
           percentile_us(50), percentile_us(99), longest / 1000.0);
}

int main(int argc, char **argv) {
    struct epoll_event events[256];
    int told_held = 0;
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    parse(argc, argv);
    epoll_fd = epoll_create1(0);
    slots = calloc(options.slots, sizeof *slots);
    unused = calloc(options.slots, sizeof *unused);
    for (int i = 0; i < options.slots; i++) {
        slots[i].fd = -1;
        unused[unused_count++] = i;
    }
    if (options.hold) {
        struct epoll_event event = {.events = EPOLLIN};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &event);
    }
    begin = now();
    for (uint64_t next_look = begin + 1000000000; !all_done();) {
        start_more();
        int busy = unused_count && !stopping && started < options.count;
        int count = epoll_wait(epoll_fd, events, 256, busy ? (options.rate ? 1 : unused_count == options.slots ? 0 : 10) : 100);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr)
                on_event(events[i].data.ptr, events[i].events);
            else
                stopping |= read(0, buffer, sizeof buffer) <= 0;
        }
        long held = strchr(options.mix, 'L') ? answered_now : connected_now;
        if (options.hold && !told_held && held >= options.slots) {
            told_held = 1;
            printf("HELD\n");
            fflush(stdout);
        }
        if (now() > next_look) {
            next_look += 1000000000;
            look_at_clocks();
            printf("PROGRESS %ld\n", ended);
            fflush(stdout);
        }
    }
    tell();
    return 0;
}
