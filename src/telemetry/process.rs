//! The process as the kernel sees it: resident memory, and what the control group allows.
//!
//! A container's limits are not in the machine's figures: a pod with a quota of two processors on a machine of 64 must
//! not start 64 threads. Both versions of control groups are read; along the path from the process's group to the root
//! the tightest limit counts. Whatever cannot be read does not limit.

use std::fs;
use std::path::{Path, PathBuf};

/// cgroup v1 says "no limit" with the largest page-aligned number; nothing sold today has an exbibyte of memory.
const UNLIMITED_BYTES: u64 = 1 << 60;

/// Resident set of this process in bytes.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    resident_in(Path::new("/"), page_bytes())
}

/// Memory limit of this process's control group in bytes; `None` without one.
#[must_use]
pub fn memory_limit() -> Option<u64> {
    memory_limit_in(Path::new("/"))
}

/// Processors this process may use: those its affinity allows, no more than its control group's quota (rounded up, so
/// that a quota of 1.5 is used whole), at least one.
#[must_use]
pub fn available_cpus() -> usize {
    let all = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    available_cpus_in(Path::new("/")).unwrap_or_else(all)
}

fn page_bytes() -> u64 {
    // The kernel tells every process in its auxiliary vector (`AT_PAGESZ`, key 6); reading it needs no C call.
    const AT_PAGESZ: usize = 6;
    let auxv = fs::read("/proc/self/auxv").unwrap_or_default();
    auxv.chunks_exact(2 * size_of::<usize>())
        .map(|pair| {
            let (key, value) = pair.split_at(size_of::<usize>());
            let word = |bytes: &[u8]| usize::from_ne_bytes(bytes.try_into().expect("cut to the size of a word"));
            (word(key), word(value))
        })
        .find(|&(key, _)| key == AT_PAGESZ)
        .map_or(4096, |(_, value)| value as u64)
}

fn resident_in(root: &Path, page_bytes: u64) -> Option<u64> {
    let statm = fs::read_to_string(root.join("proc/self/statm")).ok()?;
    statm.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(page_bytes)
}

fn memory_limit_in(root: &Path) -> Option<u64> {
    let v2 = groups(root, None).into_iter().map(|group| group.join("memory.max"));
    let v1 = groups(root, Some("memory")).into_iter().map(|group| group.join("memory.limit_in_bytes"));
    v2.chain(v1).filter_map(|file| read_number(&file)).filter(|&bytes| bytes < UNLIMITED_BYTES).min()
}

fn available_cpus_in(root: &Path) -> Option<usize> {
    let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let allowed = count_list(list.trim())?;
    let v2 = groups(root, None).into_iter().filter_map(|group| {
        let text = fs::read_to_string(group.join("cpu.max")).ok()?;
        let (quota, period) = text.trim().split_once(' ')?;
        whole_cpus(quota.parse().ok()?, period.parse().ok()?)
    });
    let v1 = groups(root, Some("cpu")).into_iter().filter_map(|group| {
        let quota = read_number(&group.join("cpu.cfs_quota_us"))?;
        whole_cpus(quota, read_number(&group.join("cpu.cfs_period_us"))?)
    });
    Some(v2.chain(v1).fold(allowed, usize::min).max(1))
}

fn whole_cpus(quota: u64, period: u64) -> Option<usize> {
    if period == 0 {
        return None;
    }
    usize::try_from(quota.div_ceil(period)).ok().map(|cpus| cpus.max(1))
}

/// A number alone in a file; `max` and `-1` (no limit) are none.
fn read_number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Counts a list such as `0-3,8`.
fn count_list(list: &str) -> Option<usize> {
    list.split(',')
        .map(|part| match part.split_once('-') {
            Some((first, last)) => {
                let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
                last.checked_sub(first)?.checked_add(1)
            }
            None => part.parse::<usize>().ok().map(|_| 1),
        })
        .sum()
}

/// Directories of this process's control group and its parents: of version 1's `controller`, or of version 2.
fn groups(root: &Path, controller: Option<&str>) -> Vec<PathBuf> {
    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap_or_default();
    let (membership, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let has = |list: &str, name: &str| list.split(',').any(|entry| entry == name);
    let path = membership.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        controller.map_or(controllers.is_empty(), |name| has(controllers, name)).then_some(path)
    });
    // "36 35 98:0 /mount-root /mount-point options - type source super-options"
    let mount = mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut kind = right.split(' ');
        let (kind, options) = (kind.next()?, kind.nth(1)?);
        let wanted = controller.map_or(kind == "cgroup2", |name| kind == "cgroup" && has(options, name));
        let mut fields = left.split(' ').skip(3);
        wanted.then_some((fields.next()?, fields.next()?))
    });
    let (Some(path), Some((mount_root, mount_point))) = (path, mount) else {
        return Vec::new();
    };
    let top = root.join(mount_point.trim_start_matches('/'));
    // Inside a container the mount shows only the part below `mount_root`. A path from elsewhere (it holds "..", or the
    // namespace hides it) leaves the mount's top, which then is the container's own group.
    let below = Path::new(path).strip_prefix(mount_root).unwrap_or(Path::new(""));
    let below = if below.components().any(|part| part.as_os_str() == "..") { Path::new("") } else { below };
    below.ancestors().map(|part| top.join(part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture(tempfile::TempDir);

    impl Fixture {
        fn new(files: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let file = dir.path().join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            Self(dir)
        }

        fn limits(&self) -> (Option<u64>, Option<usize>) {
            (memory_limit_in(self.0.path()), available_cpus_in(self.0.path()))
        }
    }

    const STATUS: (&str, &str) =
        ("proc/self/status", "Name:\tniwaki\nCpus_allowed:\tff\nCpus_allowed_list:\t0-5,8,10\n");
    const V2_MOUNT: (&str, &str) =
        ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");

    #[test]
    fn version_2_takes_the_tightest_limit_up_the_tree() {
        let fixture = Fixture::new(&[
            STATUS,
            V2_MOUNT,
            ("proc/self/cgroup", "0::/kubepods/pod1/app\n"),
            ("sys/fs/cgroup/kubepods/pod1/app/memory.max", "max\n"),
            ("sys/fs/cgroup/kubepods/pod1/memory.max", "268435456\n"),
            ("sys/fs/cgroup/kubepods/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/kubepods/pod1/app/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/kubepods/cpu.max", "max 100000\n"),
        ]);
        assert_eq!(fixture.limits(), (Some(268_435_456), Some(2)));
    }

    #[test]
    fn version_2_inside_a_namespace_reads_the_mounts_top() {
        let fixture = Fixture::new(&[
            STATUS,
            V2_MOUNT,
            ("proc/self/cgroup", "0::/../../other\n"),
            ("sys/fs/cgroup/memory.max", "1000\n"),
            ("sys/fs/cgroup/cpu.max", "5000 100000\n"),
        ]);
        assert_eq!(fixture.limits(), (Some(1000), Some(1)));
    }

    #[test]
    fn version_1_knows_its_controllers_and_its_way_to_say_none() {
        let fixture = Fixture::new(&[
            STATUS,
            (
                "proc/self/mountinfo",
                "33 31 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n\
                 34 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("proc/self/cgroup", "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n"),
            ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "250000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(fixture.limits(), (None, Some(3)));
    }

    #[test]
    fn without_a_quota_the_affinity_counts() {
        let no_quota = Fixture::new(&[
            STATUS,
            ("proc/self/mountinfo", "33 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"),
            ("proc/self/cgroup", "2:cpu:/\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(no_quota.limits(), (None, Some(8)));
        assert_eq!(Fixture::new(&[STATUS]).limits(), (None, Some(8)));
        assert_eq!(Fixture::new(&[]).limits(), (None, None));
    }

    #[test]
    fn lists_and_statm_are_read_with_care() {
        assert_eq!(count_list("0-5,8,10"), Some(8));
        assert_eq!(count_list("3-1"), None);
        assert_eq!(count_list(""), None);
        let fixture = Fixture::new(&[("proc/self/statm", "9000 21 5 1 0 300 0\n")]);
        assert_eq!(resident_in(fixture.0.path(), 4096), Some(21 * 4096));
        let cut = Fixture::new(&[("proc/self/statm", "9000")]);
        assert_eq!(resident_in(cut.0.path(), 4096), None);
    }

    #[test]
    fn this_process_is_alive() {
        assert!(resident_bytes().is_none_or(|bytes| bytes > 100_000), "{:?}", resident_bytes());
        let all = std::thread::available_parallelism().unwrap().get();
        assert!((1..=all + 1).contains(&available_cpus()), "{} of {all}", available_cpus());
    }
}
