/* Starts a program on a Cortex-M4 whose output goes to the debugger (semihosting). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern char data_source, data_start, data_end, bss_start, bss_end, stack_top;
int main(void);
void initialise_monitor_handles(void);
void _init(void) {}
void _fini(void) {}

void reset(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xF << 20; /* enables the floating-point unit */
    memcpy(&data_start, &data_source, (size_t)(&data_end - &data_start));
    memset(&bss_start, 0, (size_t)(&bss_end - &bss_start));
    initialise_monitor_handles();
    exit(main());
}

static void fault(void) { abort(); }

__attribute__((section(".vectors"), used)) static void *const vectors[] = {
    &stack_top, reset, fault, fault,
};
