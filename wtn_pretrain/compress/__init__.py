"""From the bridged thin network to the plain one."""
