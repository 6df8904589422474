// The forward of head dims 97 to 128.
#include "grid_attention_hopper_forward.h"

VK_FORWARDS(128)
