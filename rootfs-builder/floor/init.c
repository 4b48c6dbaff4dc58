/*
 * The least a guest can do: print one line and power the machine off.
 *
 * `make bench` boots it with the same QEMU, kernel and command line as a pod;
 * what it takes is the floor below every `kuasar-runv run`. It has no C
 * library, so that no start-up code is measured.
 */
#include <linux/reboot.h>
#include <sys/syscall.h>

static long call4(long number, long a, long b, long c, long d)
{
	long result;
	register long r10 __asm__("r10") = d;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return result;
}

void _start(void)
{
	static const char line[] = "floor: init runs\n";

	/* The kernel has opened the console as descriptors 0, 1 and 2. A
	 * failed write shows as a missing line; there is nobody to tell. */
	call4(SYS_write, 1, (long)line, sizeof(line) - 1, 0);
	call4(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
	      LINUX_REBOOT_CMD_POWER_OFF, 0);
	/* Without ACPI the kernel only halts; ending PID 1 makes it panic,
	 * which ends the machine under panic=-1. */
	call4(SYS_exit, 0, 0, 0, 0);
	__builtin_unreachable();
}
