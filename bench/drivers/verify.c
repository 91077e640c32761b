/* Integrity: streams of random courses (stream.h), both ends of which must see the same bytes and the same ends as without a proxy.
 * Some send the hello in two parts, some glue data to it, some pause at random. The seed is printed; -r repeats a run. */
#include "loadgen.h"
#include "stream.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FIRST_PART = 200, GLUED = 3000, SPLIT_PAUSE_NS = 2000000, MAX_PAUSE_NS = 2000000, ONE_IN = 32, REPORT_TRIES = 20, REPORT_PAUSE_US = 200000, EXAMPLES = 2 };
static const uint64_t STUCK_AFTER_NS = 4000000000ull;
enum habits { SPLITS = 1, GLUES = 2, PAUSES = 4, ALL_HABITS = 8 };

struct slot {
    struct end end;
    struct note note;
    unsigned habits;
    int live, hello_sent;
    uint64_t wake, progress_at;
    uint32_t interest;
};

static int epoll_fd;
static long started, live, failed_connect;
static uint64_t bytes;
static uint8_t *verdicts; /* one a stream, of the client's end */
static struct end *opened; /* each stream's end as it was opened, to report its course */

static void watch(struct slot *slot, int operation, uint32_t interest) {
    struct epoll_event event = {.events = interest, .data.ptr = slot};
    if (operation == EPOLL_CTL_ADD || interest != slot->interest)
        epoll_ctl(epoll_fd, operation, slot->end.fd, &event);
    slot->interest = interest;
}

static void open_stream(struct slot *slot) {
    memset(slot, 0, sizeof *slot);
    slot->note = (struct note){.seed = options.seed, .id = started++, .streams = options.maximum, .size = options.size};
    int fd = dial(slot->note.id, PORT_STREAM, 0);
    if (fd < 0) {
        failed_connect++;
        return;
    }
    end_open(&slot->end, &slot->note, CLIENT, fd);
    opened[slot->note.id] = slot->end;
    slot->habits = random_below(&slot->end.random, ALL_HABITS);
    slot->live = 1;
    slot->progress_at = now();
    live++;
    watch(slot, EPOLL_CTL_ADD, EPOLLOUT);
}

static void pause_for(struct slot *slot, uint64_t nanoseconds) {
    slot->wake = now() + nanoseconds;
    watch(slot, EPOLL_CTL_MOD, 0);
}

static void send_hello(struct slot *slot) {
    uint8_t data[HELLO_LENGTH + GLUED];
    long length = HELLO_LENGTH - slot->hello_sent, glued = 0;
    memcpy(data, hellos[slot->note.id % destinations], HELLO_LENGTH);
    memcpy(data + NOTE_OFFSET, &slot->note, sizeof slot->note);
    if (slot->habits & SPLITS && !slot->hello_sent) {
        send(slot->end.fd, data, FIRST_PART, MSG_NOSIGNAL);
        slot->hello_sent = FIRST_PART;
        pause_for(slot, SPLIT_PAUSE_NS);
        return;
    }
    if (slot->habits & GLUES) {
        const uint8_t *first;
        glued = end_may_send(&slot->end, GLUED, &first);
        memcpy(data + HELLO_LENGTH, first, glued);
    }
    ssize_t count = send(slot->end.fd, data + slot->hello_sent, length + glued, MSG_NOSIGNAL);
    if (count == length + glued) {
        slot->hello_sent = HELLO_LENGTH;
        end_sent(&slot->end, glued);
    } else { /* the socket is new: it takes that much unless the connection is gone */
        slot->end.finished = slot->end.saw_reset = 1;
        close(slot->end.fd);
    }
}

static void close_stream(struct slot *slot) {
    verdicts[slot->note.id] = end_verdict(&slot->end);
    bytes += slot->end.sent + slot->end.received;
    slot->live = 0;
    live--;
}

static void give_up_if_stuck(struct slot *slot) {
    if (!slot->live || now() < slot->progress_at + STUCK_AFTER_NS)
        return;
    close(slot->end.fd);
    close_stream(slot);
}

static void on_event(struct slot *slot, uint32_t events) {
    long before = slot->end.sent + slot->end.received;
    if (slot->hello_sent < HELLO_LENGTH)
        send_hello(slot);
    else
        end_serve(&slot->end, events);
    if (slot->end.sent + slot->end.received != before)
        slot->progress_at = now();
    if (slot->end.finished) {
        close_stream(slot);
    } else if (slot->wake == 0) {
        if (slot->habits & PAUSES && random_below(&slot->end.random, ONE_IN) == 0)
            pause_for(slot, random_below(&slot->end.random, MAX_PAUSE_NS));
        else
            watch(slot, EPOLL_CTL_MOD, end_interest(&slot->end));
    }
}

static void wake_up(struct slot *slot) {
    if (!slot->live || !slot->wake || now() < slot->wake)
        return;
    slot->wake = 0;
    watch(slot, EPOLL_CTL_MOD, slot->hello_sent < HELLO_LENGTH ? EPOLLOUT : end_interest(&slot->end));
}

/* Ask the origin for the verdicts of its ends. 0, or -1 if it cannot be asked. */
static int fetch_report(uint8_t *theirs) {
    uint8_t hello[HELLO_LENGTH];
    struct note note = {.seed = options.seed, .streams = options.maximum};
    int fd = dial(0, PORT_REPORT, 0);
    memcpy(hello, hellos[0], sizeof hello);
    memcpy(hello + NOTE_OFFSET, &note, sizeof note);
    if (fd < 0)
        return -1;
    set_receive_timeout(fd, 5);
    int failed = write_fully(fd, hello, sizeof hello) || read_fully(fd, theirs, options.maximum);
    close(fd);
    return failed ? -1 : 0;
}

/* The origin's ends may finish a little later than ours. */
static void settled_report(uint8_t *theirs) {
    for (int i = 0; i < REPORT_TRIES; i++) {
        if (fetch_report(theirs) == 0 && !memchr(theirs, UNFINISHED, options.maximum))
            return;
        usleep(REPORT_PAUSE_US);
    }
}

static void print_example(long id, int server_verdict, int first) {
    static const char *const verdict_names[] = {"unfinished", "right", "wrong end", "wrong bytes"};
    const struct end *end = &opened[id];
    printf("%s\"%ld: %s, actor %s, %ld up, %ld down: client %s, server %s\"", first ? "" : ",", id, course_names[end->course],
           end->actor == CLIENT ? "client" : "server", end->size[CLIENT], end->size[SERVER], verdict_names[verdicts[id]], verdict_names[server_verdict]);
}

static int is_right(long id, const uint8_t *theirs) { return verdicts[id] == RIGHT && theirs[id] == RIGHT; }

static void print_result(const uint8_t *theirs, double elapsed) {
    long right = 0, wrong_ends = 0, wrong_bytes = 0, stuck = 0, wrong_of[COURSES] = {0};
    for (long i = 0; i < options.maximum; i++) {
        int worst = verdicts[i] > theirs[i] ? verdicts[i] : theirs[i];
        right += is_right(i, theirs);
        wrong_bytes += worst == WRONG_BYTES;
        wrong_ends += worst == WRONG_END;
        stuck += worst <= RIGHT && !is_right(i, theirs);
        wrong_of[opened[i].course] += !is_right(i, theirs);
    }
    printf("{\"mode\":\"verify\",\"seed\":%u,\"streams\":%ld,\"size\":%ld,\"ok\":%ld,\"wrong_ends\":%ld,\"wrong_bytes\":%ld,\"stuck\":%ld,"
           "\"connect_err\":%ld,\"bytes\":%llu,\"elapsed\":%.3f,\"wrong\":{",
           options.seed, options.maximum, options.size, right, wrong_ends, wrong_bytes, stuck, failed_connect, (unsigned long long)bytes, elapsed);
    for (int i = 0; i < COURSES; i++)
        printf("%s\"%s\":%ld", i ? "," : "", course_names[i], wrong_of[i]);
    printf("},\"examples\":[");
    long shown = 0, shown_of[COURSES] = {0};
    for (long i = 0; i < options.maximum; i++)
        if (!is_right(i, theirs) && shown_of[opened[i].course]++ < EXAMPLES)
            print_example(i, theirs[i], shown++ == 0);
    printf("]}\n");
}

int mode_verify(void) {
    struct slot *slots = calloc(options.connections, sizeof *slots);
    struct epoll_event events[128];
    uint8_t *theirs = calloc(options.maximum, 1);
    uint64_t begin = now();
    verdicts = calloc(options.maximum, 1);
    opened = calloc(options.maximum, sizeof *opened);
    epoll_fd = epoll_create1(0);
    fprintf(stderr, "verify: seed %u\n", options.seed);
    while (started < options.maximum || live) {
        for (int i = 0; i < options.connections; i++)
            if (!slots[i].live && started < options.maximum)
                open_stream(&slots[i]);
        int count = epoll_wait(epoll_fd, events, 128, 1);
        for (int i = 0; i < count; i++)
            on_event(events[i].data.ptr, events[i].events);
        for (int i = 0; i < options.connections; i++) {
            wake_up(&slots[i]);
            give_up_if_stuck(&slots[i]);
        }
    }
    settled_report(theirs);
    print_result(theirs, (now() - begin) / 1e9);
    return 0;
}
