// Grid attention, backward, for compute capability 9.0a: head dims that 128 values hold.
#include "grid_attention_hopper_backward.h"

VK_HOPPER_BACKWARDS(128, bf16, 96, 64)
VK_HOPPER_BACKWARDS(128, f16, 96, 64)
