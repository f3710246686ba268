//! The user and the capabilities.

use caps::{CapSet, clear, read};
use nix::unistd::{self, Gid, Uid};

use super::Identity;

/// Empties the bounding set, so that no program that is started can get a capability either. Those who may not have no need
/// to: what they start gets nothing that they lack, once `no_new_privs` is set.
pub(super) fn limit() {
    // Some systems count more capabilities than the crate knows, or allow it for some only: each is tried.
    for capability in read(None, CapSet::Bounding).unwrap_or_default() {
        drop(caps::drop(None, CapSet::Bounding, capability));
    }
}

/// Becomes another user, with its groups, and makes sure that there is no way back.
pub(super) fn become_user(identity: &Identity) -> Result<(), String> {
    let Identity { name, uid, gid, .. } = identity;
    let describe = |what: &'static str| move |error: nix::Error| format!("cannot {what}: {error}");
    let c_name = std::ffi::CString::new(name.as_str()).map_err(|_| "the user's name holds a zero byte".to_owned())?;
    let mut groups = unistd::getgrouplist(&c_name, *gid).map_err(describe("list its groups"))?;
    // Root's group owns what others may not write.
    groups.retain(|group| group.as_raw() != 0);
    unistd::setgroups(&groups).map_err(describe("set its groups"))?;
    unistd::setgid(*gid).map_err(describe("set its group"))?;
    unistd::setuid(*uid).map_err(describe("set its user"))?;
    check(*uid, *gid)
}

fn check(uid: Uid, gid: Gid) -> Result<(), String> {
    let users = unistd::getresuid().map_err(|error| error.to_string())?;
    let group_ids = unistd::getresgid().map_err(|error| error.to_string())?;
    let is_user = [users.real, users.effective, users.saved].iter().all(|id| *id == uid);
    let is_group = [group_ids.real, group_ids.effective, group_ids.saved].iter().all(|id| *id == gid);
    if !is_user || !is_group {
        return Err("the system left the old user or group behind".to_owned());
    }
    let is_way_back = unistd::setuid(Uid::from_raw(0)).is_ok() || unistd::seteuid(Uid::from_raw(0)).is_ok();
    if is_way_back { Err("root can still be become again".to_owned()) } else { Ok(()) }
}

/// Empties every set of capabilities and looks whether they are.
pub(super) fn drop_all() -> Result<(), String> {
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        clear(None, set).map_err(|error| error.to_string())?;
        let left = read(None, set).map_err(|error| error.to_string())?;
        if !left.is_empty() {
            return Err(format!("{} capabilities are left in the {set:?} set", left.len()));
        }
    }
    Ok(())
}
