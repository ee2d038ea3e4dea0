/* One plain read: every eight bytes are added as a number, and nothing else is asked. The floor that kernels are measured against. */
#include <stdint.h>

uint64_t read_all(const uint64_t *const *pointers, const int64_t *words, int64_t tensors) {
    uint64_t total = 0;
    for (int64_t k = 0; k < tensors; k++)
        for (int64_t i = 0; i < words[k]; i++)
            total += pointers[k][i];
    return total;
}
