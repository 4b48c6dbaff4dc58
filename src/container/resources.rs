//! Limits of a container, as config.json and `update` name them.
//!
//! The record keeps what `create` and every `update` asked for, because some
//! limits of the guest's cgroup v2 follow from several of them (the limit of
//! swap is that of memory and swap together, less that of memory). As with runc,
//! what an update does not mention stays, and 0 means "not set".

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// The part of `linux.resources` (config-linux.md) that can be changed while the
/// container runs. Fields that are not here are ignored, as by runc.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Resources {
    #[serde(deserialize_with = "or_default")]
    pub memory: Memory,
    #[serde(deserialize_with = "or_default")]
    pub cpu: Cpu,
    #[serde(rename = "blockIO", deserialize_with = "or_default")]
    pub block_io: BlockIo,
    #[serde(deserialize_with = "or_default")]
    pub pids: Pids,
    #[serde(deserialize_with = "or_default")]
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Files of the guest's cgroup and what to write to them.
    #[serde(deserialize_with = "or_default")]
    pub unified: BTreeMap<String, String>,
}

/// Bytes; -1 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Memory {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reservation: Option<i64>,
    /// Of memory and swap together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<i64>,
    /// Refuse a limit below what is used instead of killing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check_before_update: Option<bool>,
}

/// Times are microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Cpu {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<u64>,
    /// Negative is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_runtime: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_period: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mems: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockIo {
    /// 10 to 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// -1 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugepageLimit {
    /// As in `2MB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// `null` is as good as nothing.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Resources {
    /// The limits of a `config.json`.
    ///
    /// # Errors
    /// A value of the wrong type.
    pub fn of_config(config: &serde_json::Value) -> serde_json::Result<Resources> {
        match config.pointer("/linux/resources") {
            None | Some(serde_json::Value::Null) => Ok(Resources::default()),
            Some(resources) => Resources::deserialize(resources),
        }
    }

    /// These limits with those of `change` in their place where it has any.
    #[must_use]
    pub fn with(&self, change: &Resources) -> Resources {
        let mut merged = self.clone();
        let Resources {
            memory,
            cpu,
            block_io,
            pids,
            hugepage_limits,
            unified,
        } = change;
        put(&mut merged.memory.limit, memory.limit);
        put(&mut merged.memory.reservation, memory.reservation);
        put(&mut merged.memory.swap, memory.swap);
        put(&mut merged.cpu.shares, cpu.shares);
        put(&mut merged.cpu.quota, cpu.quota);
        put(&mut merged.cpu.burst, cpu.burst);
        put(&mut merged.cpu.period, cpu.period);
        put(&mut merged.cpu.cpus, named(&cpu.cpus));
        put(&mut merged.cpu.mems, named(&cpu.mems));
        put(&mut merged.cpu.idle, cpu.idle);
        put(&mut merged.block_io.weight, block_io.weight);
        put(&mut merged.pids.limit, pids.limit.filter(|l| *l != 0));
        // As with cgroup v1, where memory cannot be more than memory and swap.
        if memory.limit == Some(-1) && memory.swap.is_none() {
            merged.memory.swap = Some(-1);
        }
        for limit in hugepage_limits {
            merged
                .hugepage_limits
                .retain(|old| old.page_size != limit.page_size);
            merged.hugepage_limits.push(limit.clone());
        }
        let unified = unified.iter().map(|(k, v)| (k.clone(), v.clone()));
        merged.unified.extend(unified);
        merged
    }
}

fn put<T>(field: &mut Option<T>, change: Option<T>) {
    if change.is_some() {
        *field = change;
    }
}

/// An empty list of CPUs is none.
fn named(list: &Option<String>) -> Option<String> {
    list.clone().filter(|list| !list.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn resources(json: serde_json::Value) -> Resources {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn what_an_update_does_not_mention_stays() {
        let before = resources(json!({
            "memory": {"limit": 100, "swap": 200},
            "cpu": {"shares": 10, "cpus": "0"},
            "pids": {"limit": 5},
            "devices": [{"allow": false, "access": "rwm"}],
        }));
        let change = resources(json!({
            "memory": {"limit": 150}, "cpu": {"cpus": ""}, "pids": {"limit": 0}, "blockIO": null,
        }));
        let after = before.with(&change);
        assert_eq!(
            after,
            resources(json!({
                "memory": {"limit": 150, "swap": 200},
                "cpu": {"shares": 10, "cpus": "0"},
                "pids": {"limit": 5},
            }))
        );
        // The record is written as it is read.
        let text = serde_json::to_string(&after).unwrap();
        assert_eq!(serde_json::from_str::<Resources>(&text).unwrap(), after);
    }

    #[test]
    fn memory_without_a_limit_takes_that_of_swap_away() {
        let before = resources(json!({"memory": {"limit": 100, "swap": 200}}));
        let change = resources(json!({"memory": {"limit": -1}}));
        assert_eq!(before.with(&change).memory.swap, Some(-1));
    }

    #[test]
    fn a_config_without_limits_has_none() {
        for config in [json!({}), json!({"linux": {"resources": null}})] {
            assert_eq!(Resources::of_config(&config).unwrap(), Resources::default());
        }
        let wrong = json!({"linux": {"resources": {"pids": {"limit": "many"}}}});
        assert!(Resources::of_config(&wrong).is_err());
    }
}
