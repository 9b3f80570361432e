/* SHA-256 as FIPS 180-4 describes it (sections 4.1.2, 5.1.1 and 6.2). */

#include "seal.h"

#include <string.h>

enum { BLOCK = 64, ROUNDS = 64 };

typedef struct {
    uint32_t sum[8];
    uint64_t bytes; /* so far */
    unsigned char block[BLOCK];
} digest;

/* The first 32 bits behind the point of the square roots of the first 8 primes, of the cube roots of the first 64 */
static const uint32_t START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
static const uint32_t CONSTANT[ROUNDS] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t turned(uint32_t x, int places)
{
    return x >> places | x << (32 - places);
}

static void add_block(uint32_t *sum, const unsigned char *block)
{
    uint32_t w[ROUNDS], s[8];
    for (int t = 0; t < 16; t++)
        w[t] = (uint32_t)block[4 * t] << 24 | (uint32_t)block[4 * t + 1] << 16 | (uint32_t)block[4 * t + 2] << 8
               | block[4 * t + 3];
    for (int t = 16; t < ROUNDS; t++) {
        const uint32_t a = w[t - 15], b = w[t - 2];
        w[t] = w[t - 16] + w[t - 7];
        w[t] += (turned(a, 7) ^ turned(a, 18) ^ a >> 3) + (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
    }
    memcpy(s, sum, sizeof s);
    for (int t = 0; t < ROUNDS; t++) {
        const uint32_t a = s[0], e = s[4];
        const uint32_t first =
            s[7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + CONSTANT[t] + w[t];
        const uint32_t second =
            (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += first;
        s[0] = first + second;
    }
    for (int k = 0; k < 8; k++)
        sum[k] += s[k];
}

static void add(digest *d, const void *data, size_t size)
{
    const unsigned char *at = data;
    while (size > 0) {
        const size_t filled = d->bytes % BLOCK, count = size < BLOCK - filled ? size : BLOCK - filled;
        memcpy(d->block + filled, at, count);
        d->bytes += count;
        at += count;
        size -= count;
        if (d->bytes % BLOCK == 0)
            add_block(d->sum, d->block);
    }
}

static void finish(digest *d, char digits[MINIKD_SEAL_DIGITS])
{
    static const unsigned char END[BLOCK] = {0x80};
    const uint64_t bits = 8 * d->bytes;
    unsigned char length[8];
    for (int k = 0; k < 8; k++)
        length[k] = (unsigned char)(bits >> 8 * (7 - k));
    add(d, END, 1 + (BLOCK + 55 - d->bytes % BLOCK) % BLOCK);
    add(d, length, sizeof length);
    for (int k = 0; k < MINIKD_SEAL_DIGITS; k++)
        digits[k] = "0123456789abcdef"[d->sum[k / 8] >> 4 * (7 - k % 8) & 15];
}

void minikd_seal_of(char digits[MINIKD_SEAL_DIGITS], const char *seal, const unsigned char *data, size_t head,
                    size_t size)
{
    char zeros[MINIKD_SEAL_DIGITS];
    digest d = {.bytes = 0};
    memcpy(d.sum, START, sizeof START);
    memset(zeros, '0', sizeof zeros);
    size_t from = 0; /* what was not added yet */
    for (size_t at = 0; at + MINIKD_SEAL_DIGITS <= head; at++) {
        if (memcmp(data + at, seal, MINIKD_SEAL_DIGITS) != 0)
            continue;
        add(&d, data + from, at - from);
        add(&d, zeros, sizeof zeros);
        from = at + MINIKD_SEAL_DIGITS;
        at = from - 1;
    }
    add(&d, data + from, size - from);
    finish(&d, digits);
}

int minikd_seal_fits(minikd_text seal, const unsigned char *data, size_t head, size_t size)
{
    char digits[MINIKD_SEAL_DIGITS];
    if (seal.length != MINIKD_SEAL_DIGITS)
        return 0;
    minikd_seal_of(digits, seal.at, data, head, size);
    return memcmp(digits, seal.at, sizeof digits) == 0;
}
