// Grid attention, backward, for compute capability 9.0a: head dims that 64 values hold.
#include "grid_attention_hopper_backward.h"

VK_HOPPER_BACKWARDS(64, bf16, 96, 96)
VK_HOPPER_BACKWARDS(64, f16, 96, 96)
