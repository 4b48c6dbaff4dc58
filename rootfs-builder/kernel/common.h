/*
 * The headers that are compiled once for the whole kernel, see the cc wrapper.
 * A few inline functions put the module's name into a message; it is known only
 * later, so those messages begin with "kernel".
 */
#define KBUILD_MODNAME "kernel"
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/sched/signal.h>
#include <linux/interrupt.h>
#include <linux/device.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>
#include <linux/netdevice.h>
#include <linux/skbuff.h>
#include <net/sock.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/netlink.h>
#include <net/tcp.h>
#undef KBUILD_MODNAME
