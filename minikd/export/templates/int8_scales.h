/* An int8 q stands for SCALE * (q - ZERO): of a feature after (x - mean) / deviation, and of a logit. */
#define STUDENT_INPUT_SCALE @input_scale@
#define STUDENT_INPUT_ZERO (@input_zero@)
#define STUDENT_OUTPUT_SCALE @output_scale@
#define STUDENT_OUTPUT_ZERO (@output_zero@)

