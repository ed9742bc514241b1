//! The commands that the engine uses, typed.
//!
//! Each method is the QMP command of the same name; see qapi/*.json in QEMU's tree. Errors are
//! those of [`Client::execute`], and [`QmpError::Answer`] if the answer has another form than the
//! schema promises.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::client::Client;
use super::error::QmpError;
use super::types::{CpuThread, MemoryBackend, MigrationInfo, NamedChild, QemuVersion, Status};

impl Client {
    async fn ask<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::answer(command, error.to_string()))
    }

    async fn order(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute(command, arguments).await.map(drop)
    }

    /// The VM's run state.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_status(&self) -> Result<Status, QmpError> {
        self.ask("query-status", Value::Null).await
    }

    /// Stops the vCPUs; returns when devices have been drained.
    ///
    /// # Errors
    /// As the module says.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.order("stop", Value::Null).await
    }

    /// Starts the vCPUs, and takes the disks back after a migration.
    ///
    /// # Errors
    /// As the module says.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.order("cont", Value::Null).await
    }

    /// Ends QEMU. That the connection closes instead of an answer counts as success.
    ///
    /// # Errors
    /// As the module says.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.order("quit", Value::Null).await {
            Err(error) if error.is_closed() => Ok(()),
            other => other,
        }
    }

    /// How the last migration stands.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_migrate(&self) -> Result<MigrationInfo, QmpError> {
        self.ask("query-migrate", Value::Null).await
    }

    /// Whether QEMU still has something of a migration. It does for a moment after
    /// [`Client::query_migrate`] says that one has failed, and refuses another meanwhile
    /// (migration/migration.c, `migrate_fd_cleanup`).
    ///
    /// # Errors
    /// As the module says.
    pub async fn keeps_migration(&self) -> Result<bool, QmpError> {
        #[derive(serde::Deserialize)]
        struct Instance {
            r#type: String,
        }
        let list: Vec<Instance> = self.ask("query-yank", Value::Null).await?;
        Ok(list.iter().any(|instance| instance.r#type == "migration"))
    }

    /// Switches capabilities; refused while a migration runs.
    ///
    /// # Errors
    /// As the module says.
    pub async fn set_capabilities(&self, capabilities: &[(&str, bool)]) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, state)| json!({ "capability": name, "state": state }))
            .collect();
        self.order("migrate-set-capabilities", json!({ "capabilities": list })).await
    }

    /// All capabilities that this QEMU knows, and whether they are on.
    ///
    /// # Errors
    /// As the module says.
    pub async fn capabilities(&self) -> Result<BTreeMap<String, bool>, QmpError> {
        #[derive(serde::Deserialize)]
        struct Capability {
            capability: String,
            state: bool,
        }
        let list: Vec<Capability> = self.ask("query-migrate-capabilities", Value::Null).await?;
        Ok(list.into_iter().map(|entry| (entry.capability, entry.state)).collect())
    }

    /// The migration parameters as QEMU lists them.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_parameters(&self) -> Result<serde_json::Map<String, Value>, QmpError> {
        self.ask("query-migrate-parameters", Value::Null).await
    }

    /// Changes migration parameters.
    ///
    /// # Errors
    /// As the module says.
    pub async fn set_migrate_parameters(&self, parameters: Value) -> Result<(), QmpError> {
        self.order("migrate-set-parameters", parameters).await
    }

    /// Starts a migration to any address.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate", json!({ "uri": uri })).await
    }

    /// Starts a migration into a descriptor passed with [`Client::send_fd`] on this monitor.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_fd(&self, name: &str) -> Result<(), QmpError> {
        self.migrate(&format!("fd:{name}")).await
    }

    /// Lets a migration that waits in `postcopy-paused` go on over a descriptor passed on this monitor.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_resume_fd(&self, name: &str) -> Result<(), QmpError> {
        self.order("migrate", json!({ "uri": format!("fd:{name}"), "resume": true })).await
    }

    /// Hands the guest over by post-copy, which must have been announced.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_start_postcopy(&self) -> Result<(), QmpError> {
        self.order("migrate-start-postcopy", Value::Null).await
    }

    /// Ends the connection of a migration in post-copy, which then waits for another.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_pause(&self) -> Result<(), QmpError> {
        self.order("migrate-pause", Value::Null).await
    }

    /// Lets a QEMU that was started with `-incoming defer` listen or read.
    ///
    /// From QEMU 9.1 on a failure leaves it waiting for another attempt; before, it exits.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        const COMMAND: &str = "migrate-incoming";
        if self.version().at_least(9, 1) {
            let arguments = json!({ "uri": uri, "exit-on-error": false });
            match self.order(COMMAND, arguments).await {
                Err(QmpError::Command { desc, .. }) if desc.contains("exit-on-error") => {}
                other => return other,
            }
        }
        self.order(COMMAND, json!({ "uri": uri })).await
    }

    /// Reads an incoming migration from a descriptor passed on this monitor.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_incoming_fd(&self, name: &str) -> Result<(), QmpError> {
        self.migrate_incoming(&format!("fd:{name}")).await
    }

    /// Cancels the outgoing migration, if there is one.
    ///
    /// # Errors
    /// As the module says.
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.order("migrate_cancel", Value::Null).await
    }

    /// Lets QEMU announce the guest's network addresses, as it does after an incoming migration.
    ///
    /// # Errors
    /// As the module says.
    pub async fn announce_self(&self) -> Result<(), QmpError> {
        // QEMU's own values for the announcements after a migration (migration/options.c).
        let rounds = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        self.order("announce-self", rounds).await
    }

    /// Drops a descriptor that was passed and not used.
    ///
    /// # Errors
    /// As the module says.
    pub async fn close_fd(&self, name: &str) -> Result<(), QmpError> {
        self.order("closefd", json!({ "fdname": name })).await
    }

    /// QEMU's version, asked again.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_version(&self) -> Result<QemuVersion, QmpError> {
        const COMMAND: &str = "query-version";
        let answer = self.execute(COMMAND, Value::Null).await?;
        QemuVersion::from_value(&answer)
            .ok_or_else(|| QmpError::answer(COMMAND, "it has no version numbers"))
    }

    /// Whether KVM runs the guest; TCG does if not.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_kvm(&self) -> Result<bool, QmpError> {
        const COMMAND: &str = "query-kvm";
        let answer = self.execute(COMMAND, Value::Null).await?;
        let enabled = answer.get("enabled").and_then(Value::as_bool);
        enabled.ok_or_else(|| QmpError::answer(COMMAND, "it does not say whether KVM is enabled"))
    }

    /// The VM's name (`-name`), if it has one.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_name(&self) -> Result<Option<String>, QmpError> {
        let answer = self.execute("query-name", Value::Null).await?;
        Ok(answer.get("name").and_then(Value::as_str).map(str::to_owned))
    }

    /// The VM's UUID; all zeros if none was set.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_uuid(&self) -> Result<String, QmpError> {
        const COMMAND: &str = "query-uuid";
        let answer = self.execute(COMMAND, Value::Null).await?;
        let uuid = answer.get("UUID").and_then(Value::as_str);
        uuid.map(str::to_owned).ok_or_else(|| QmpError::answer(COMMAND, "it has no UUID"))
    }

    /// The vCPUs and their threads.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_cpus_fast(&self) -> Result<Vec<CpuThread>, QmpError> {
        self.ask("query-cpus-fast", Value::Null).await
    }

    /// The memory backends.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_memdev(&self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.ask("query-memdev", Value::Null).await
    }

    /// The children and properties of an object of QEMU's object tree.
    ///
    /// # Errors
    /// As the module says.
    pub async fn qom_list(&self, path: &str) -> Result<Vec<NamedChild>, QmpError> {
        self.ask("qom-list", json!({ "path": path })).await
    }

    /// One property of an object.
    ///
    /// # Errors
    /// As the module says.
    pub async fn qom_get(&self, path: &str, property: &str) -> Result<Value, QmpError> {
        self.execute("qom-get", json!({ "path": path, "property": property })).await
    }

    /// Block nodes with their drivers and cache modes.
    ///
    /// # Errors
    /// As the module says.
    pub async fn query_named_block_nodes(&self) -> Result<Vec<Value>, QmpError> {
        self.ask("query-named-block-nodes", json!({ "flat": true })).await
    }
}
