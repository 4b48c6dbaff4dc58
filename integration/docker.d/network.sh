# shellcheck shell=bash
# shellcheck disable=SC2016
# docker's networks.

case_net_bridge() {
  local seen
  seen=$(d_run --rm "$IMAGE" sh -c 'ip -4 addr show eth0; ping -c 1 -W 5 172.17.0.1')
  contains "$seen" 'inet 172.17.'
  contains "$seen" '1 packets received'
}

case_net_publish() {
  web_up -p 127.0.0.1::80
  eventually 20 output_is 'a web page' get "http://$(d port "$C" 80)"
}

case_net_publish_udp() {
  local port
  d_run -d --name "$C" -p 127.0.0.1::9999/udp "$IMAGE" socat UDP-RECV:9999 STDOUT >/dev/null
  port=$(d port "$C" 9999/udp)
  for _ in {1..20}; do
    # Refused until the server listens.
    echo ping | socat - "UDP:$port" || true
    [[ $(d logs "$C") != ping* ]] || return 0
    sleep 0.3
  done
  fail 'no datagram arrived'
}

# As docker-compose sets things up: a network, a server with an alias, a client.
case_net_compose() {
  d network create "$C" >/dev/null
  web_up --network "$C" --network-alias server
  contains "$(d_run --rm --network "$C" "$IMAGE" sh -c 'for i in 1 2 3 4 5; do wget -q -O - http://server && exit; sleep 1; done')" 'a web page'
}

case_net_connect_and_disconnect() {
  d network create "$C-2" >/dev/null
  web_up
  d network connect "$C-2" "$C"
  eventually 10 output_has eth1 d exec "$C" ls /sys/class/net
  d network disconnect "$C-2" "$C"
  eventually 10 eval '! docker exec "$C" ls /sys/class/net | grep -q eth1'
}

case_net_of_another_container() {
  web_up
  contains "$(d_run --rm --network "container:$C" "$IMAGE" wget -q -O - http://127.0.0.1)" 'a web page'
}

case_net_none_has_only_lo() {
  equal lo "$(once "$IMAGE" ls /sys/class/net | xargs)"
}

case_vm_net_host_is_refused() {
  refused network d_run --rm --network host "$IMAGE" true
}
