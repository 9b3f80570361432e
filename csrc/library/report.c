#include "report.h"

#include <stdarg.h>
#include <stdio.h>

/* Names from a file stand in these lines: what is no character for a line becomes one. */
static void keep_to_one_line(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < ' ' || *text == 0x7f)
            *text = '?';
}

minikd_error minikd_refuse(minikd_report report, minikd_error error, const char *format, ...)
{
    if (report.text && report.size) {
        va_list values;
        va_start(values, format);
        vsnprintf(report.text, report.size, format, values);
        va_end(values);
        keep_to_one_line(report.text);
    }
    return error;
}
