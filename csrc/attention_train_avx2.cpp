#define FLEXLAM_VARIANT avx2
#define FLEXLAM_LANES 8
#include "attention_train_kernel.inl"
