# shellcheck shell=bash
# Recipe of the kernel of scripts/l1, sourced by build-kernel: the packaged
# flavour's with other modules.

: "${here:?is set by build-kernel}"
# shellcheck disable=SC2034 # read by packaged.sh
module_list=$here/kernel/l1.modules
# shellcheck source=packaged.sh
. "$here/kernel/packaged.sh"
