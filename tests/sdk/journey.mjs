// The official JavaScript SDK, unmodified, on one journey through the cluster.
//
// stdin:  {"urls": [node 1, node 2, node 3], "api_key", "secret", "roll": [command...], "build": what it rolls out}
// stdout: a line {"step": NAME} for each step that held; the first that does not ends the program with its error.
//
// Alice is connected to node 1 and bob to node 2, so every live message between them crosses nodes.

import { strict as assert } from 'node:assert';
import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { promisify } from 'node:util';
import { StreamChat } from 'stream-chat';

const LIVE_WITHIN_MS = 5_000;
// Several failed attempts of the SDK, each up to 7 s after the one before, may fall into a restart.
const RECOVERED_WITHIN_MS = 60_000;

const { urls, api_key, secret, roll, build } = JSON.parse(readFileSync(0, 'utf8'));

const clientOf = (node, ...more) => new StreamChat(api_key, ...more, { baseURL: urls[node - 1], allowServerSideConnect: true });
const done = (step) => process.stdout.write(`${JSON.stringify({ step })}\n`);

/** Resolves with the first event of that type that matches; rejects when none came in time. */
const heard = (client, type, withinMs, matches = () => true) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      listener.unsubscribe();
      reject(new Error(`${client.userID} heard no ${type} within ${withinMs} ms`));
    }, withinMs);
    const listener = client.on(type, (event) => {
      if (!matches(event)) return;
      clearTimeout(timer);
      listener.unsubscribe();
      resolve(event);
    });
  });

/** Sends from one channel object and waits until the other client has heard it; returns the message's id. */
const sendAndHear = async (from, listener) => {
  const id = randomUUID();
  const [sent, event] = await Promise.all([
    from.sendMessage({ id, text: 'hello' }),
    heard(listener, 'message.new', LIVE_WITHIN_MS, (event) => event.message.id === id),
  ]);
  assert.equal(sent.message.id, id);
  assert.equal(event.cid, from.cid);
  return id;
};

const office = clientOf(3, secret);
const [alice, bob] = [clientOf(1), clientOf(2)];

await office.upsertUsers([{ id: 'alice', name: 'Alice' }, { id: 'bob' }]);
done('upsert users');

const hello = await alice.connectUser({ id: 'alice' }, office.createToken('alice'));
await bob.connectUser({ id: 'bob' }, office.createToken('bob'));
assert.equal(hello.me.id, 'alice');
assert.match(alice.wsConnection.connectionID, /us-east-1/);
assert.match(bob.wsConnection.connectionID, /us-east-2/);
done('connect');

const channelId = `sdk-javascript-${randomUUID().slice(0, 8)}`;
const aliceRoom = alice.channel('messaging', channelId, { members: ['alice', 'bob'] });
const bobRoom = bob.channel('messaging', channelId);
await aliceRoom.watch();
await bobRoom.watch();
assert.deepEqual(Object.keys(bobRoom.state.members).sort(), ['alice', 'bob']);
done('watch');

const began = new Date(Date.now() - 60_000).toISOString();
const first = await sendAndHear(aliceRoom, bob);
done('send, live on another node');
assert.ok(bobRoom.state.messages.some((message) => message.id === first));
done('message in the channel state');

assert.equal((await bob.getMessage(first)).message.text, 'hello');
assert.equal((await office.getMessage(first)).message.text, 'hello');
done('read back');

await assert.rejects(aliceRoom.sendMessage({ id: first, text: 'hello' }), (error) => {
  assert.equal(error.code, 4);
  assert.equal(error.status, 400);
  assert.match(error.message, /already exists/);
  return true;
});
done('duplicate id refused');

const { events } = await bob.sync([aliceRoom.cid], began);
assert.deepEqual(
  events.filter((event) => event.type === 'message.new').map((event) => event.message.id),
  [first],
);
done('sync');

const recovered = Promise.all([alice, bob].map((client) => heard(client, 'connection.recovered', RECOVERED_WITHIN_MS)));
await promisify(execFile)(roll[0], roll.slice(1));
await recovered;
assert.ok(alice.wsConnection.connectionID.includes(build), alice.wsConnection.connectionID);
assert.ok(bob.wsConnection.connectionID.includes(build), bob.wsConnection.connectionID);
done('reconnect after a restart of the node');

await sendAndHear(aliceRoom, bob);
await sendAndHear(bobRoom, alice);
done('live again');

await Promise.all([alice.disconnectUser(), bob.disconnectUser()]);
done('disconnect');
process.exit(0);
