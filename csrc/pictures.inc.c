/* Pictures moved by a few pixels. */

#include "parallel.h"
#include "rows.h"

/* Nanoseconds that a picture takes beside its pixels, and a pixel: measured for float in the second cache. */
#define PICTURE_NS 15.0
#define PIXEL_NS (0.12 / 4 * sizeof(real))

/* y = the same places of `blank`, or 0 without one. */
static void put_blank(real *y, const real *blank, int64_t first, int64_t count)
{
    if (blank)
        memcpy(y + first, blank + first, (size_t)count * sizeof(real));
    else
        memset(y + first, 0, (size_t)count * sizeof(real));
}

/* y = picture x moved down by `down` and right by `right`, each less than the picture has in that direction.
 *
 * Both are one row of pixels, and so is the move: what it carries over the edge of a line is put right afterwards. */
static void move_picture(real *y, const real *x, const real *blank, int64_t height, int64_t width, int64_t down,
                         int64_t right)
{
    const int64_t by = down * width + right, count = height * width - (by < 0 ? -by : by);
    memcpy(y + (by > 0 ? by : 0), x + (by < 0 ? -by : 0), (size_t)count * sizeof(real));
    const int64_t lines = down < 0 ? -down : down, columns = right < 0 ? -right : right;
    put_blank(y, blank, down > 0 ? 0 : (height - lines) * width, lines * width);
    for (int64_t line = 0; columns && line < height; line++)
        put_blank(y, blank, line * width + (right > 0 ? 0 : width - columns), columns);
}

static void shift_images_part(void *shared, int64_t start, int64_t end)
{
    const minikd_call *call = shared;
    const real *blank = call->buffer[2];
    const uint32_t step = (uint32_t)*(const int64_t *)call->buffer[3];
    const minikd_attributes *a = &call->attribute;
    const uint32_t stream = (uint32_t)a->stream ^ 0x80000000u; /* no stream of a mask's */
    const int64_t m = call->size[1], width = a->width, height = m / width;
    uint32_t words[4 * DRAWN];
    for (int64_t first = start; first < end; first += 2 * DRAWN) {
        const int64_t count = smaller(end - first, 2 * DRAWN);
        draw(words, (uint64_t)first / 2, (count + 1) / 2, a->seed, step, stream);
        for (int64_t k = 0; k < count; k++) {
            const int64_t at = (first + k) * m;
            move_picture((real *)call->buffer[0] + at, (const real *)call->buffer[1] + at, blank, height, width,
                         move_of(words[2 * k], a->most), move_of(words[2 * k + 1], a->most));
        }
    }
}

/* y_i = picture x_i moved down by dy and right by dx, where nothing comes from: fill, or 0;
 * (dy, dx) = ⌊r·(2·most + 1) / 2³²⌋ - most,  r = philox(seed, stream ⊕ 2³¹, step, 2·i and 2·i + 1) */
static int64_t shift_images(const minikd_call *call)
{
    const int64_t n = call->size[0], m = call->size[1];
    minikd_parallel(shift_images_part, (void *)call, n, minikd_grain(n, PICTURE_NS + PIXEL_NS * (double)m, 2));
    return MINIKD_DONE;
}
