// The forward of head dims up to 64.
#include "grid_attention_hopper_forward.h"

VK_FORWARDS(64)
VK_FORWARDS_OF_THREE(64)
