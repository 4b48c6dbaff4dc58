# shellcheck shell=bash
# shellcheck disable=SC2016
# podman's networks.

# net_up [OPTION...]: like up, with a web server.
web_up() {
  p run -d --name "$C" "$@" "$IMAGE" httpd -f -h /www >/dev/null
}

# get URL: from the host.
get() {
  curl -sS --max-time 5 "$1"
}

case_net_none_has_only_lo() {
  equal 'lo' "$(run "$IMAGE" ls /sys/class/net | xargs)"
  contains "$(run --cap-add NET_RAW "$IMAGE" ping -c 1 127.0.0.1)" '1 packets received'
}

case_net_bridge_reaches_the_host() {
  local seen
  seen=$(p run --rm --cap-add NET_RAW "$IMAGE" sh -c 'ip -4 addr show eth0; ping -c 1 -W 5 10.88.0.1')
  contains "$seen" 'inet 10.88.'
  contains "$seen" '1 packets received'
}

case_net_bridge_server_is_reached() {
  web_up
  eventually 20 output_is 'a web page' get "http://$(p inspect -f '{{.NetworkSettings.IPAddress}}' "$C")"
}

case_net_publish_tcp() {
  web_up -p 127.0.0.1::80
  eventually 20 output_is 'a web page' get "http://$(p port "$C" 80)"
}

case_net_publish_udp() {
  local port
  p run -d --name "$C" -p 127.0.0.1::9999/udp "$IMAGE" socat UDP-RECV:9999 STDOUT >/dev/null
  port=$(p port "$C" 9999/udp)
  for _ in {1..20}; do
    # Refused until the server listens.
    echo ping | socat - "UDP:$port" || true
    [[ $(p logs "$C") != ping* ]] || return 0
    sleep 0.3
  done
  fail 'no datagram arrived'
}

case_net_two_containers_by_name() {
  p network create "$C" >/dev/null
  web_up --network "$C"
  contains "$(p run --rm --network "$C" "$IMAGE" sh -c "for i in 1 2 3 4 5; do wget -q -O - http://$C && exit; sleep 1; done")" 'a web page'
}

case_net_own_address_and_mac() {
  local seen
  p network create --subnet 10.77.0.0/24 "$C" >/dev/null
  seen=$(p run --rm --network "$C:ip=10.77.0.9,mac=92:d0:c6:0a:29:33" "$IMAGE" sh -c 'ip addr show eth0')
  contains "$seen" 'inet 10.77.0.9/24'
  contains "$seen" '92:d0:c6:0a:29:33'
}

case_net_ipv6() {
  p network create --ipv6 --subnet fd77::/64 "$C" >/dev/null
  contains "$(p run --rm --cap-add NET_RAW --network "$C" "$IMAGE" sh -c 'sleep 2; ping -6 -c 1 -W 5 fd77::1')" '1 packets received'
}

case_net_two_networks() {
  p network create "$C-1" >/dev/null
  p network create "$C-2" >/dev/null
  equal 'eth0 eth1 lo' "$(p run --rm --network "$C-1" --network "$C-2" "$IMAGE" ls /sys/class/net | xargs)"
}

case_net_connect_and_disconnect() {
  p network create "$C-1" >/dev/null
  p network create "$C-2" >/dev/null
  web_up --network "$C-1"
  p network connect "$C-2" "$C"
  eventually 10 output_has eth1 p exec "$C" ls /sys/class/net
  p network disconnect "$C-2" "$C"
  eventually 10 eval '! podman exec "$C" ls /sys/class/net | grep -q eth1'
}

case_net_macvlan() {
  local link="v$BASHPID"
  ip link add "$link" type veth peer name "$link-p"
  ip link set "$link" up
  ip link set "$link-p" up
  p network create -d macvlan -o "parent=$link" --subnet 10.78.0.0/24 "$C" >/dev/null
  contains "$(p run --rm --network "$C" "$IMAGE" ip addr show eth0)" 'inet 10.78.0.'
  ip link del "$link"
}

case_net_of_another_container() {
  web_up
  contains "$(p run --rm --network "container:$C" "$IMAGE" wget -q -O - http://127.0.0.1)" 'a web page'
}

case_net_namespace_by_path() {
  local ns="n$BASHPID" seen
  ip netns add "$ns"
  ip link add "h$ns" type veth peer name d0 netns "$ns"
  ip -n "$ns" addr add 10.79.0.1/24 dev d0
  ip -n "$ns" link set d0 up
  seen=$(p run --rm --network "ns:/run/netns/$ns" "$IMAGE" ip addr)
  ip netns del "$ns"
  contains "$seen" 'inet 10.79.0.1'
}

case_vm_net_host_is_refused() {
  refused 'network' p run --rm --network host "$IMAGE" true
  contains "$OUT" 'host'
}

case_net_userns_and_bridge() {
  contains "$(p run --rm --uidmap 0:1000:500 "$IMAGE" ip addr show eth0)" 'inet 10.88.'
}

case_net_dns_files() {
  local seen
  seen=$(p run --rm --dns 10.1.1.1 --dns-search example.org "$IMAGE" cat /etc/resolv.conf)
  contains "$seen" '10.1.1.1'
  contains "$seen" 'example.org'
}
