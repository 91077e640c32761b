/* One end of a stream of bytes whose whole course both ends derive from (seed, id): what each sends, where it half-closes or resets,
 * and so how the stream must look and end at the other. verify drives one end, the origin the other, a proxy is in between.
 *
 *   PLAIN           both send everything and end.
 *   EARLY_END       the actor ends early and goes on reading; the other holds back its second half until it saw that end.
 *   QUIET_RESET     the actor resets once both have received everything (the other holds back its last byte until then).
 *   SUDDEN_RESET    the actor resets somewhere in the middle: the other gets a true beginning, then a reset.
 *   END_THEN_RESET  like EARLY_END, but the actor resets while it reads the second half. */
#ifndef STREAM_H
#define STREAM_H
#include "hello.h"
#include <stdint.h>

enum course { PLAIN, EARLY_END, QUIET_RESET, SUDDEN_RESET, END_THEN_RESET, COURSES };
enum role { CLIENT, SERVER };
enum verdict { UNFINISHED, RIGHT, WRONG_END, WRONG_BYTES };
extern const char *const course_names[COURSES];

struct end {
    /* The course. */
    enum course course;
    enum role role, actor;
    long size[2]; /* bytes that each role sends */
    long reset_at; /* bytes sent and received (SUDDEN_RESET) or received (END_THEN_RESET) at which the actor resets */
    unsigned offset[2]; /* where in the common block of random bytes each role's bytes begin */
    uint64_t random; /* state of the random lengths of this end's sends and receives */
    /* What happened so far. */
    int fd;
    long sent, received;
    int half_closed, saw_end, saw_reset, did_reset, wrong_bytes, finished;
};

/* Takes over fd, a non-blocking socket: end_serve closes it. */
void end_open(struct end *end, const struct note *note, enum role role, int fd);
/* Send and receive once each, as far as the course and the events of epoll allow. */
void end_serve(struct end *end, uint32_t events);
/* The same with what the client glued to the hello. */
void end_take(struct end *end, const uint8_t *data, long length);
/* Up to limit bytes that may be sent now, at *data; they count as sent once end_sent() says so. 0 while the course holds them back. */
long end_may_send(const struct end *end, long limit, const uint8_t **data);
void end_sent(struct end *end, long length);
/* The events of epoll to wait for. */
uint32_t end_interest(const struct end *end);
enum verdict end_verdict(const struct end *end);
/* A random number below limit; the same for the same seed. */
uint64_t random_below(uint64_t *state, uint64_t limit);
#endif
