// Grid attention, backward, for compute capability 9.0a: head dims that 96 values hold.
#include "grid_attention_hopper_backward.h"

VK_HOPPER_BACKWARDS(96, bf16, 96, 96)
VK_HOPPER_BACKWARDS(96, f16, 96, 96)
