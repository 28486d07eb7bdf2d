//! A replica that starts beside a running one.

use penstock_scaler::args::Settings;

use crate::scripted::{BACKEND, Engine, Scaler, Servers, pod, world};

#[tokio::test]
async fn starting_replica_knows_the_targets_of_its_peer_before_it_is_asked() {
    let mut servers = Servers::default();
    let engine = Engine::default();
    engine.set(0.9, 9, 9);
    let pods = vec![pod("a", servers.engine(&engine).await)];
    let mut first = Scaler::start(Settings::default(), world(1, 1, pods.clone(), &[])).await;
    first.wait_for_metric(BACKEND, 3.0).await;
    let settings = Settings {
        peers: Some(first.admin.to_string()),
        ..Settings::default()
    };
    let second = Scaler::start(settings, world(1, 1, pods, &[])).await;
    let known = async {
        while !second
            .admin_page("/decisions")
            .await
            .1
            .contains("\"kvCache\"")
        {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(crate::scripted::DEADLINE, known)
        .await
        .unwrap();
    first.stop().await;
    second.stop().await;
}
