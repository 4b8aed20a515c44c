// A js-libp2p peer that dials one address, pings it, asks it who it is, and prints what it learned as one line of JSON.
//
//     node --import ./polyfill.mjs dial.mjs MULTIADDRESS SEED     (the seed of its own Ed25519 key, in hex)

import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const [address, seed] = process.argv.slice(2)
const node = await createLibp2p({
  privateKey: await generateKeyPairFromSeed('Ed25519', Buffer.from(seed, 'hex')),
  addresses: { listen: [] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify({ runOnConnectionOpen: false }), ping: ping() },
  connectionMonitor: { enabled: false }
})
try {
  const connection = await node.dial(multiaddr(address), { signal: AbortSignal.timeout(10_000) })
  const milliseconds = await node.services.ping.ping(connection.remotePeer)
  const answer = await node.services.identify.identify(connection)
  console.log(JSON.stringify({
    self: node.peerId.toString(),
    peer: connection.remotePeer.toString(),
    encryption: connection.encryption,
    muxer: connection.multiplexer,
    milliseconds,
    identified: answer.peerId.toString(),
    agent: answer.agentVersion,
    protocols: answer.protocols
  }))
} finally {
  await node.stop()
}
