use std::process::{Child, Command, Stdio};
use std::thread;

use rustbus::wire::unmarshal::traits::Variant;

use super::*;

fn scope(text: &str) -> Result<Scope, String> {
    Scope::of(text, "c1").map_err(|e| e.to_string())
}

#[test]
fn engines_name_slice_prefix_and_name() {
    let scope = scope("machine-a-b.slice:libpod:123").unwrap();
    assert_eq!(scope.unit, "libpod-123.scope");
    assert_eq!(
        scope.path(),
        Path::new("/machine.slice/machine-a.slice/machine-a-b.slice/libpod-123.scope")
    );
}

#[test]
fn what_is_left_out_has_runcs_defaults() {
    assert_eq!(scope("").unwrap().unit, "runc-c1.scope");
    let bare = scope("-.slice::x").unwrap();
    assert_eq!(bare.path(), Path::new("/x.scope"));
}

#[test]
fn other_forms_are_refused() {
    for text in [
        "/a/b",
        "a:b",
        "a.slice:b:",
        "nothing:b:c",
        "a.slice:b:c:d",
        "a/b.slice:c:d",
    ] {
        assert!(scope(text).is_err(), "{text}");
    }
    let error = scope("/a/b").unwrap_err();
    assert!(
        error.contains("expected cgroupsPath to be of format"),
        "{error}"
    );
}

#[test]
fn a_placeholder_ends_with_its_value() {
    let holder = Placeholder::spawn().unwrap();
    let pid = holder.pid.as_raw();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    assert!(!holder.is_in("no-such.scope"));
    drop(holder);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_scope_that_has_ended_by_itself_is_no_failure() {
    let no_such_unit = kind_of("org.freedesktop.systemd1.NoSuchUnit");
    assert_eq!(no_such_unit, io::ErrorKind::NotFound);
    let other = kind_of("org.freedesktop.DBus.Error.AccessDenied");
    assert_eq!(other, io::ErrorKind::Other);
}

/// A bus of the test's own.
struct Bus {
    daemon: Child,
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Bus {
    fn start() -> Bus {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus");
        let config = dir.path().join("bus.conf");
        let text = format!(
            "<busconfig><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow send_destination=\"*\"/><allow own=\"*\"/>\
             <allow receive_sender=\"*\"/><allow user=\"*\"/></policy></busconfig>",
            path.display()
        );
        std::fs::write(&config, text).unwrap();
        let daemon = Command::new("dbus-daemon")
            .arg("--nofork")
            .arg(format!("--config-file={}", config.display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + DEADLINE;
        while !path.exists() {
            assert!(Instant::now() < end, "dbus-daemon does not listen");
            thread::sleep(POLL);
        }
        Bus {
            daemon,
            _dir: dir,
            path,
        }
    }

    fn connect(&self) -> RpcConn {
        let address = UnixAddr::new(&self.path).unwrap();
        RpcConn::connect_to_path(address, Timeout::Duration(DEADLINE)).unwrap()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Takes calls as systemd would and returns each as text.
fn serve(mut connection: RpcConn, calls: usize) -> Vec<String> {
    let mut seen = Vec::new();
    for _ in 0..calls {
        let call = connection.wait_call(Timeout::Duration(DEADLINE)).unwrap();
        let member = call.dynheader.member.clone().unwrap();
        let mut body = call.body.parser();
        let unit: String = body.get().unwrap();
        let mut text = format!("{member} {unit}");
        let mode: Option<String> = match member.as_str() {
            "SetUnitProperties" => body.get::<bool>().ok().map(|runtime| runtime.to_string()),
            _ => body.get::<String>().ok(),
        };
        text.push_str(&format!(" {}", mode.unwrap()));
        if member != "StopUnit" {
            for (name, value) in body.get::<Vec<(String, Variant<'_, '_>)>>().unwrap() {
                let shown = (value.get::<String>())
                    .or_else(|_| value.get::<bool>().map(|v| v.to_string()))
                    .or_else(|_| value.get::<u64>().map(|v| v.to_string()))
                    .or_else(|_| value.get::<Vec<u32>>().map(|v| format!("{v:?}")));
                text.push_str(&format!(" {name}={}", shown.unwrap()));
            }
        }
        let mut answer = call.dynheader.make_response();
        connection
            .send_message(&mut answer)
            .unwrap()
            .write_all()
            .map_err(force_finish_on_error)
            .unwrap();
        seen.push(text);
    }
    seen
}

/// A real bus checks what is sent against its signature.
#[test]
fn systemd_gets_what_it_documents() {
    let bus = Bus::start();
    let mut service = bus.connect();
    let mut name = rustbus::standard_messages::request_name(NAME, 0);
    let serial = service
        .send_message(&mut name)
        .unwrap()
        .write_all()
        .map_err(force_finish_on_error)
        .unwrap();
    service
        .wait_response(serial, Timeout::Duration(DEADLINE))
        .unwrap();
    let systemd = thread::spawn(move || serve(service, 3));

    let mut client = Systemd(bus.connect());
    let properties = vec![
        text("Slice", "a.slice".into()),
        ("PIDs".to_owned(), Value::Pids(vec![7])),
        switch("Delegate", true),
    ];
    client.start_transient("a-b.scope", properties).unwrap();
    let resources: Resources =
        serde_json::from_value(serde_json::json!({"cpu": {"shares": 2, "quota": -1}})).unwrap();
    client
        .set_properties("a-b.scope", limits(&resources))
        .unwrap();
    client.stop("a-b.scope").unwrap();
    let seen = systemd.join().unwrap();
    // Nobody has the name any more, or, before the bus has noticed, nobody answers.
    let error = client.stop("a-b.scope").unwrap_err().to_string();
    let refused = ["ServiceUnknown", "NoReply"].map(|name| error.contains(name));
    assert!(refused.contains(&true), "{error}");
    assert_eq!(
        seen[0],
        "StartTransientUnit a-b.scope replace Slice=a.slice PIDs=[7] Delegate=true"
    );
    let shares = if super::super::is_v2_only() {
        "CPUWeight=10"
    } else {
        "CPUShares=256"
    };
    assert_eq!(
        seen[1],
        format!(
            "SetUnitProperties a-b.scope true {shares} CPUQuotaPerSecUSec={}",
            u64::MAX
        )
    );
    assert_eq!(seen[2], "StopUnit a-b.scope replace");
}
