// rpc-websockets as a client of an Ethereum node, driven by lines on stdin (lines.mjs). It asks for new blocks whenever it is connected.
import { Client } from 'rpc-websockets';
import { serve, tell } from './lines.mjs';

const clients = new Map();

await serve({
    connect({ name, url }) {
        const client = new Client(url, { reconnect_interval: 300, max_reconnects: 0 });
        clients.set(name, client);
        client.on('open', async () => {
            // The library tells the code only.
            client.socket.addEventListener('close', ({ code, reason, wasClean }) =>
                tell('close', name, { code, reason, clean: wasClean }),
            );
            tell('subscribed', name, { id: await client.call('eth_subscribe', ['newHeads']) });
        });
        client.on('eth_subscription', ({ result }) => tell('head', name, { number: Number(result.number) }));
        // An attempt that came to nothing.
        client.on('error', ({ message }) => tell('refused', name, { message }));
    },

    call: ({ name, method, params }) => clients.get(name).call(method, params, 20_000),

    // Writes `size` bytes and reads them again, each in one message.
    async code({ name, size }) {
        const [account] = await clients.get(name).call('eth_accounts', []);
        const sent = `0x${'5b'.repeat(size)}`;
        await clients.get(name).call('evm_setAccountCode', [account, sent], 20_000);
        return (await clients.get(name).call('eth_getCode', [account, 'latest'], 20_000)) === sent;
    },

    close({ name }) {
        clients.get(name).close(1000);
    },
});
