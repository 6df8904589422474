// The forward of head dims 65 to 96.
#include "grid_attention_hopper_forward.h"

VK_FORWARDS(96)
