// The products of the gradients for compute capability 9.0: dX = dU W, whose right operand lies [k, n] in memory, and dW = dU^T X, whose
// operands lie [k, m] and [k, n].
#include "pruned_hopper.h"

VK_BOXED_FORMS(pruned_hopper_nn, false, true, false)
VK_BOXED_FORMS(pruned_hopper_tn, true, true, false)
