#define FLEXLAM_VARIANT portable
#define FLEXLAM_LANES 4
#include "attention_train_kernel.inl"
