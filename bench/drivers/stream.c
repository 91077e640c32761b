#include "stream.h"
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PERIOD = 1048573, MAX_SEND = 65536, MAX_RECEIVE = 262144 }; /* a prime: no length that proxies use hides a lost or doubled piece */

const char *const course_names[COURSES] = {"plain", "early end", "quiet reset", "sudden reset", "end then reset"};
static uint8_t block[PERIOD + MAX_RECEIVE]; /* random bytes of that period, continued so that no read has to wrap */

uint64_t random_below(uint64_t *state, uint64_t limit) { /* splitmix64 */
    uint64_t x = *state += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return limit ? (x ^ (x >> 31)) % limit : 0;
}

static void fill_block(void) {
    uint64_t state = 1;
    if (block[0] || block[1])
        return;
    for (int i = 0; i < PERIOD; i++)
        block[i] = 1 + random_below(&state, 255);
    memcpy(block + PERIOD, block, MAX_RECEIVE);
}

void end_open(struct end *end, const struct note *note, enum role role, int fd) {
    uint64_t random = ((uint64_t)note->seed << 32 | note->id) + 1;
    fill_block();
    memset(end, 0, sizeof *end);
    end->fd = fd;
    end->role = role;
    end->course = random_below(&random, COURSES);
    end->actor = random_below(&random, 2);
    end->size[CLIENT] = end->size[SERVER] = note->size;
    if (end->course == EARLY_END || end->course == END_THEN_RESET)
        end->size[end->actor] = random_below(&random, 4) ? random_below(&random, note->size) : 0;
    end->reset_at = end->course == SUDDEN_RESET ? 1 + random_below(&random, 2 * note->size) : note->size / 2 + 1 + random_below(&random, note->size / 2);
    end->offset[CLIENT] = random_below(&random, PERIOD);
    end->offset[SERVER] = random_below(&random, PERIOD);
    end->random = random + role;
}

static int is_actor(const struct end *end) { return end->role == end->actor; }

static enum role peer_of(const struct end *end) { return end->role == CLIENT ? SERVER : CLIENT; }

static long to_receive(const struct end *end) { return end->size[peer_of(end)]; }

static int ends_itself(const struct end *end) {
    return end->course == PLAIN || end->course == EARLY_END || (end->course == END_THEN_RESET && is_actor(end));
}

static int expects_end(const struct end *end) {
    return end->course == PLAIN || end->course == EARLY_END || (end->course == END_THEN_RESET && !is_actor(end));
}

static int expects_reset(const struct end *end) { return end->course >= QUIET_RESET && !is_actor(end); }

static int reset_is_due(const struct end *end) {
    if (!is_actor(end))
        return 0;
    switch (end->course) {
    case QUIET_RESET: return end->sent == end->size[end->role] && end->received == to_receive(end);
    case SUDDEN_RESET: return end->received && end->sent + end->received >= end->reset_at; /* received: so the server was reached */
    case END_THEN_RESET: return end->half_closed && end->received >= end->reset_at;
    default: return 0;
    }
}

long end_may_send(const struct end *end, long limit, const uint8_t **data) {
    long allowed = end->size[end->role];
    if (!is_actor(end) && (end->course == EARLY_END || end->course == END_THEN_RESET) && !end->saw_end)
        allowed /= 2;
    if (!is_actor(end) && end->course == QUIET_RESET && end->received < to_receive(end))
        allowed--;
    allowed -= end->sent;
    *data = block + (end->offset[end->role] + end->sent) % PERIOD;
    return allowed < limit ? allowed : limit;
}

static void finish(struct end *end) {
    end->finished = 1;
    close(end->fd);
}

static void reset(struct end *end) {
    struct linger linger = {.l_onoff = 1};
    setsockopt(end->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    end->did_reset = 1;
    finish(end);
}

/* Do what is due after progress: reset, half-close, or close. */
static void settle(struct end *end) {
    if (end->finished)
        return;
    if (reset_is_due(end)) {
        reset(end);
        return;
    }
    if (!end->half_closed && ends_itself(end) && end->sent == end->size[end->role]) {
        shutdown(end->fd, SHUT_WR);
        end->half_closed = 1;
    }
    int closed = end->saw_end && (!expects_end(end) || (end->half_closed && !expects_reset(end)));
    if (closed || end->saw_reset || end->wrong_bytes)
        finish(end);
    else if (reset_is_due(end))
        reset(end);
}

void end_sent(struct end *end, long length) {
    end->sent += length;
    settle(end);
}

void end_take(struct end *end, const uint8_t *data, long length) {
    const uint8_t *expected = block + (end->offset[peer_of(end)] + end->received) % PERIOD;
    end->received += length;
    end->wrong_bytes |= end->received > to_receive(end) || memcmp(data, expected, length);
    settle(end);
}

static int broken(int error) { return error == ECONNRESET || error == EPIPE; }

static void receive(struct end *end) {
    static uint8_t data[MAX_RECEIVE];
    ssize_t count = recv(end->fd, data, 1 + random_below(&end->random, MAX_RECEIVE), MSG_DONTWAIT);
    if (count > 0) {
        end_take(end, data, count);
        return;
    }
    end->saw_end |= count == 0;
    end->saw_reset |= count < 0 && broken(errno);
    settle(end);
}

static void transmit(struct end *end) {
    const uint8_t *data;
    long length = end_may_send(end, 1 + random_below(&end->random, MAX_SEND), &data);
    ssize_t count = length > 0 ? send(end->fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT) : 0;
    end->saw_reset |= count < 0 && broken(errno);
    end_sent(end, count > 0 ? count : 0);
}

void end_serve(struct end *end, uint32_t events) {
    if (!end->saw_end && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        receive(end);
    } else if (events & EPOLLERR) { /* after the end of the stream recv() gives 0 for ever */
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(end->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        end->saw_reset |= broken(error);
        settle(end);
    }
    if (!end->finished)
        transmit(end);
}

uint32_t end_interest(const struct end *end) {
    const uint8_t *data;
    return (end->saw_end ? 0 : EPOLLIN) | (end_may_send(end, 1, &data) > 0 ? EPOLLOUT : 0);
}

enum verdict end_verdict(const struct end *end) {
    if (!end->finished)
        return UNFINISHED;
    if (end->wrong_bytes)
        return WRONG_BYTES;
    if (end->course >= QUIET_RESET && is_actor(end))
        return end->did_reset ? RIGHT : WRONG_END;
    if (end->saw_end != expects_end(end) || end->saw_reset != expects_reset(end))
        return WRONG_END;
    return end->course == SUDDEN_RESET || end->received == to_receive(end) ? RIGHT : WRONG_BYTES;
}
