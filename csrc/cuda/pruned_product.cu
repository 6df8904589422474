// The layers' own products, X W^T: A [m, k] and B [n, k] as they lie in memory; of pairs B has 2 n rows.
#include "pruned_product.h"

VK_PRUNED_FORMS(pruned_product_nt, false, false, false)
VK_PRUNED_FORMS(pruned_product_pairs, false, false, true)
