//! Sockets between processes: nobody sends a descriptor through them.
//!
//! Both doors of this kind are read with plain reads, for which the kernel closes every descriptor that comes along. Where
//! it can (Linux 6.16), it already refuses to let one be sent: what lies in a socket unread counts against its sender only. The
//! option has no safe wrapper of its own yet, and gets one here by nix's macro for that purpose.

use std::os::fd::AsFd;

use nix::libc;
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};

/// `SO_PASSRIGHTS`, which the C library does not name yet. Source: include/uapi/asm-generic/socket.h.
const SO_PASSRIGHTS: libc::c_int = 83;

sockopt_impl!(
    /// Whether descriptors may be sent to a socket.
    PassRights,
    SetOnly,
    libc::SOL_SOCKET,
    SO_PASSRIGHTS,
    bool
);

/// Refuses descriptors from now on. False where the kernel cannot.
pub(crate) fn refuse_descriptors(socket: &impl AsFd) -> bool {
    setsockopt(socket, PassRights, &false).is_ok()
}
