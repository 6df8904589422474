// The products of the gradients: dX = dU W, whose right operand lies [k, n] in memory, and dW = dU^T X, whose operands lie [k, m] and
// [k, n].
#include "pruned_product.h"

VK_PRUNED_FORMS(pruned_product_nn, false, true, false)
VK_PRUNED_FORMS(pruned_product_tn, true, true, false)
