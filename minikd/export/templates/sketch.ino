// Classifies what comes in over the serial line: @features@ numbers a row, separated by commas.
//
// Arduino looks for this file in a folder of its own name, with @header@ and @source@ beside it.
// It takes @flash_bytes@ bytes of flash, about, and @stack_bytes@ of stack.

#include "@header@"

static float features[STUDENT_FEATURES];
static int filled = 0;

void setup() {
  Serial.begin(115200);
}

void loop() {
  if (Serial.available() == 0) {
    return;
  }
  features[filled++] = Serial.parseFloat();
  if (filled < STUDENT_FEATURES) {
    return;
  }
  filled = 0;
  const int class_id = student_class(features, STUDENT_FEATURES);
  if (class_id < 0) {
    Serial.print("error ");
    Serial.println(class_id);
  } else {
    Serial.println(student_class_name(class_id));
  }
}
