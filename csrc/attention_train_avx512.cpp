#define FLEXLAM_VARIANT avx512
#define FLEXLAM_LANES 16
#include "attention_train_kernel.inl"
