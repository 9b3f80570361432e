#include "json.h"

#include <string.h>

#define LIMIT ((int64_t)1 << 62)

static void pass_white_space(minikd_json *json)
{
    while (json->at < json->end && strchr(" \t\r\n", *json->at) && *json->at)
        json->at++;
}

int minikd_json_sign(minikd_json *json, char sign)
{
    pass_white_space(json);
    const int found = json->at < json->end && *json->at == sign;
    json->at += found;
    return found;
}

int minikd_json_end(minikd_json *json)
{
    pass_white_space(json);
    return json->at == json->end;
}

int minikd_json_member(minikd_json *json, int64_t index, char closing)
{
    if (minikd_json_sign(json, closing))
        return 0;
    return index == 0 || minikd_json_sign(json, ',') ? 1 : -1;
}

int minikd_json_whole(minikd_json *json, int64_t *number)
{
    pass_white_space(json);
    const char *first = json->at;
    for (*number = 0; json->at < json->end && *json->at >= '0' && *json->at <= '9'; json->at++) {
        const int digit = *json->at - '0';
        if (*number > (LIMIT - 1 - digit) / 10)
            return 0;
        *number = 10 * *number + digit;
    }
    const ptrdiff_t digits = json->at - first;
    return digits == 1 || (digits > 1 && *first != '0');
}

/* --- texts --- */

/* How many bytes the first character of UTF-8 has; 0 where it is none, or one that a text cannot hold as it stands. */
static ptrdiff_t character(const char *at, const char *end)
{
    const unsigned char *byte = (const unsigned char *)at;
    if (byte[0] < 0x80)
        return byte[0] >= ' ';
    const ptrdiff_t size = byte[0] >= 0xf0 ? 4 : byte[0] >= 0xe0 ? 3 : 2;
    if (byte[0] < 0xc2 || byte[0] > 0xf4 || end - at < size)
        return 0;
    for (ptrdiff_t k = 1; k < size; k++)
        if ((byte[k] & 0xc0) != 0x80)
            return 0;
    const int too_long = (byte[0] == 0xe0 && byte[1] < 0xa0) || (byte[0] == 0xf0 && byte[1] < 0x90);
    const int surrogate = byte[0] == 0xed && byte[1] >= 0xa0, too_high = byte[0] == 0xf4 && byte[1] >= 0x90;
    return too_long || surrogate || too_high ? 0 : size;
}

/* The four digits of \uXXXX, which are passed over; -1 where there are none. */
static int32_t four_digits(minikd_json *json)
{
    int32_t code = 0;
    if (json->end - json->at < 4)
        return -1;
    for (int k = 0; k < 4; k++, json->at++) {
        static const char DIGITS[] = "0123456789abcdef";
        const char lower = *json->at >= 'A' && *json->at <= 'F' ? (char)(*json->at - 'A' + 'a') : *json->at;
        const char *digit = lower ? strchr(DIGITS, lower) : NULL;
        if (!digit)
            return -1;
        code = 16 * code + (int32_t)(digit - DIGITS);
    }
    return code;
}

/* What \uXXXX stands for, with the second half of a pair where it is the first of one; -1 for half a pair. */
static int32_t code_point(minikd_json *json)
{
    const int32_t high = four_digits(json);
    if (high < 0xd800 || high > 0xdfff)
        return high;
    if (high > 0xdbff || json->end - json->at < 2 || json->at[0] != '\\' || json->at[1] != 'u')
        return -1;
    json->at += 2;
    const int32_t low = four_digits(json);
    return low < 0xdc00 || low > 0xdfff ? -1 : 0x10000 + (high - 0xd800) * 0x400 + (low - 0xdc00);
}

/* Write a character in UTF-8; returns the place behind it. No escape is shorter than what it stands for. */
static char *put(char *to, int32_t code)
{
    const int32_t more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const int32_t FIRST[] = {0, 0xc0, 0xe0, 0xf0};
    *to++ = (char)(FIRST[more] | code >> 6 * more);
    for (int32_t k = more - 1; k >= 0; k--)
        *to++ = (char)(0x80 | (code >> 6 * k & 0x3f));
    return to;
}

/* The character that an escape stands for, whose backslash was passed over; -1 where it is none. */
static int32_t escaped(minikd_json *json)
{
    static const char SIGNS[] = "\"\\/bfnrt", MEANINGS[] = "\"\\/\b\f\n\r\t";
    const char sign = json->at < json->end ? *json->at++ : '\0';
    const char *found = sign ? strchr(SIGNS, sign) : NULL;
    return sign == 'u' ? code_point(json) : found ? MEANINGS[found - SIGNS] : -1;
}

int minikd_json_text(minikd_json *json, minikd_text *text)
{
    if (!minikd_json_sign(json, '"'))
        return 0;
    char *to = text->at = json->at;
    while (json->at < json->end && *json->at != '"') {
        if (*json->at == '\\') {
            json->at++;
            const int32_t code = escaped(json);
            if (code < 0)
                return 0;
            to = put(to, code);
        } else {
            const ptrdiff_t size = character(json->at, json->end);
            if (size == 0)
                return 0;
            memmove(to, json->at, (size_t)size);
            to += size;
            json->at += size;
        }
    }
    if (json->at == json->end)
        return 0;
    json->at++;
    *to = '\0';
    text->length = (size_t)(to - text->at);
    return 1;
}

minikd_json minikd_json_within(minikd_text text)
{
    const minikd_json json = {text.at, text.at + text.length};
    return json;
}

minikd_text minikd_text_of(const char *letters)
{
    const minikd_text text = {(char *)letters, strlen(letters)};
    return text;
}

int minikd_text_is(minikd_text text, const char *letters)
{
    return text.length == strlen(letters) && memcmp(text.at, letters, text.length) == 0;
}

int minikd_text_order(minikd_text a, minikd_text b)
{
    const int order = memcmp(a.at, b.at, a.length < b.length ? a.length : b.length);
    return order != 0 ? (order > 0) - (order < 0) : (a.length > b.length) - (a.length < b.length);
}
