/* A realistic TLS 1.3 ClientHello in one record of 517 bytes; the server name is not the first extension. */
#ifndef HELLO_H
#define HELLO_H
#include <stdint.h>
#include <string.h>

enum { HELLO_LENGTH = 517, NOTE_OFFSET = 11 };

/* What verify tells the origin, in the place of the hello's 32 random bytes: no proxy looks at them. */
struct note {
    uint32_t seed, id, streams;
    uint64_t size;
};

static inline uint8_t *put_u16(uint8_t *at, unsigned value) {
    at[0] = value >> 8;
    at[1] = value & 255;
    return at + 2;
}

static inline uint8_t *put_bytes(uint8_t *at, const void *data, unsigned length) {
    memcpy(at, data, length);
    return at + length;
}

static inline uint8_t *put_extension(uint8_t *at, unsigned type, const void *data, unsigned length) {
    at = put_u16(at, type);
    at = put_u16(at, length);
    if (length)
        at = put_bytes(at, data, length);
    return at;
}

static inline uint8_t *put_filler(uint8_t *at, unsigned length, unsigned step) {
    for (unsigned i = 0; i < length; i++)
        *at++ = i * step + 1;
    return at;
}

/* Writes the hello for a server name. Returns HELLO_LENGTH, or -1 if the name is too long. RFC 8446 4.1.2, 4.2. */
static inline int build_hello(uint8_t *hello, const char *name) {
    static const uint8_t ciphers[] = {0x13, 0x01, 0x13, 0x02, 0x13, 0x03, 0xc0, 0x2b, 0xc0, 0x2f, 0xc0, 0x2c, 0xc0, 0x30, 0xcc, 0xa9,
                                      0xcc, 0xa8, 0xc0, 0x13, 0xc0, 0x14, 0x00, 0x9c, 0x00, 0x9d, 0x00, 0x2f, 0x00, 0x35};
    static const uint8_t groups[] = {0, 8, 0x00, 0x1d, 0x00, 0x17, 0x00, 0x18, 0x00, 0x19};
    static const uint8_t signatures[] = {0, 16, 4, 3, 8, 4, 4, 1, 5, 3, 8, 5, 5, 1, 8, 6, 6, 1};
    static const uint8_t alpn[] = {0, 12, 2, 'h', '2', 8, 'h', 't', 't', 'p', '/', '1', '.', '1'};
    static const uint8_t versions[] = {4, 3, 4, 3, 3};
    static const uint8_t padding[HELLO_LENGTH];
    unsigned name_length = strlen(name);
    uint8_t body[300], *end, *at = hello;
    if (name_length > 200)
        return -1;

    at = put_bytes(at, "\x16\x03\x01", 3); /* record: handshake, TLS 1.0 */
    at = put_u16(at, HELLO_LENGTH - 5);
    at = put_bytes(at, "\x01\x00", 2); /* ClientHello */
    at = put_u16(at, HELLO_LENGTH - 9);
    at = put_bytes(at, "\x03\x03", 2);
    at = put_filler(at, 32, 37); /* random */
    *at++ = 32;
    at = put_filler(at, 32, 17); /* session id */
    at = put_u16(at, sizeof ciphers);
    at = put_bytes(at, ciphers, sizeof ciphers);
    at = put_bytes(at, "\x01\x00", 2); /* no compression */
    uint8_t *extensions = at;
    at += 2;
    at = put_extension(at, 23, NULL, 0);
    at = put_extension(at, 0xff01, "", 1);
    at = put_extension(at, 10, groups, sizeof groups);
    at = put_extension(at, 11, "\1\0", 2);
    at = put_extension(at, 35, NULL, 0);
    at = put_extension(at, 16, alpn, sizeof alpn);
    end = put_u16(body, name_length + 3);
    *end++ = 0;
    end = put_u16(end, name_length);
    end = put_bytes(end, name, name_length);
    at = put_extension(at, 0, body, end - body); /* server name */
    at = put_extension(at, 5, "\1\0\0\0\0", 5);
    at = put_extension(at, 13, signatures, sizeof signatures);
    end = put_u16(body, 36);
    end = put_u16(end, 29);
    end = put_u16(end, 32);
    end = put_filler(end, 32, 7);
    at = put_extension(at, 51, body, end - body); /* key share */
    at = put_extension(at, 45, "\1\1", 2);
    at = put_extension(at, 43, versions, sizeof versions);
    int missing = HELLO_LENGTH - (int)(at - hello) - 4;
    if (missing < 0)
        return -1;
    at = put_extension(at, 21, padding, missing);
    put_u16(extensions, HELLO_LENGTH - (int)(extensions - hello) - 2);
    return at - hello;
}
#endif
