/* What the modes of loadgen share. */
#ifndef LOADGEN_H
#define LOADGEN_H
#include "clock.h"
#include "hello.h"
#include <stddef.h>
#include <stdint.h>

/* Ports of the origin; origin.c says what each of them does. */
enum { PORT_REPLY = 443, PORT_SINK = 5001, PORT_SOURCE = 5002, PORT_ECHO = 5003, PORT_HOLD = 5004, PORT_STREAM = 5005, PORT_REPORT = 5006 };

struct options {
    int connections;
    long maximum;
    long size;
    double seconds;
    uint32_t seed;
};
extern struct options options;
extern uint8_t hellos[16][HELLO_LENGTH]; /* one for each destination */
extern int destinations;
extern uint8_t buffer[1 << 20];

/* The socket of a connection to the i-th destination, or -1. */
int dial(int i, int port, int nonblocking);
/* 0, or -1 if the connection ends before. */
int read_fully(int fd, void *data, size_t length);
int write_fully(int fd, const void *data, size_t length);
void set_receive_timeout(int fd, int seconds);

int mode_conn(void);
int mode_down(void);
int mode_up(void);
int mode_rr(void);
int mode_idle(void);
int mode_verify(void);
#endif
