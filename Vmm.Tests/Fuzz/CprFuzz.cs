using System.Net.Sockets;
using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.SaveVm;
using Vmm.Devices.Vfio.User.Client;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Migration.Channels;
using Vmm.Migration.Cpr;
using Vmm.Tests.Support;

namespace Vmm.Tests.Fuzz;

/// <summary>
/// Damaged forms of what one process hands to the next: the CPR state, the table of descriptors and the transcript of a vfio-user device. The
/// reader accepts each or refuses it with a <see cref="VmmException"/> that names the fault, and no descriptor stays open.
/// </summary>
[TestFixture]
public sealed class CprFuzz
{
    private const int Rounds = 200;

    /// <summary>Reads one CPR state; the first byte gives the count of descriptors, and whether they come as numbers.</summary>
    public static void FuzzState(ReadOnlySpan<byte> input)
    {
        if (input.IsEmpty) return;
        MigrationMode mode = (input[0] & 1) == 0 ? MigrationMode.CprTransfer : MigrationMode.CprExec;
        int most = input[0] >> 4;
        var given = new List<OwnedFd>();
        try
        {
            var table = new CprFdTable();
            table.Receive(CprState.Parse(input[1..], mode, number => given.Count >= most || (mode == MigrationMode.CprExec && number > 1000) ? null : Give(given)));
            using OwnedFd? taken = table.Take("m", 0);
            using (table) Assert.That(table.IsIncoming);
        }
        catch (VmmException e)
        {
            Assert.That(e.Message, Does.Contain("CPR state").Or.Contain("descriptor"));
        }
        Assert.That(given.Count(static f => !f.IsClosed), Is.Zero, "descriptors stay open");
    }

    /// <summary>Reads one transcript; the first byte gives the count of descriptors.</summary>
    public static void FuzzTranscript(ReadOnlySpan<byte> input)
    {
        if (input.IsEmpty) return;
        var given = new List<OwnedFd>();
        OwnedFd memory = Posix.MemFd("fuzz", Math.Max(1, input.Length - 1));
        Posix.PWrite(memory, input[1..], 0, out _);
        var fds = new List<CprFd> { new("d_vfio-user", 2, memory), new("d_vfio-user", 0, Give(given)), new("d_vfio-user", 1, Give(given)) };
        for (int i = 0; i < input[0] % 8; i++) fds.Add(new CprFd("d_vfio-user-fd", i, Give(given)));
        using (var table = new CprFdTable())
        {
            table.Receive(new CprIncoming(MigrationMode.CprTransfer, fds, []));
            try
            {
                VfioUserHandover handover = VfioUserHandover.Take(table, "d");
                using (handover.Socket)
                using (handover.Twin)
                using (handover.Transcript)
                {
                    byte[] again = handover.Transcript.ToBytes();
                    Assert.That(again.AsSpan().SequenceEqual(input[1..]), "what was read is not what was written");
                }
            }
            catch (VmmException e)
            {
                Assert.That(e.Message, Does.Contain("transcript").Or.Contain("descriptor"));
            }
        }
        Assert.That(given.Append(memory).Count(static f => !f.IsClosed), Is.Zero, "descriptors stay open");
    }

    [Test]
    public void StatesOfAnyBytesEndWell([Range(1, 10)] int seed) => Each(seed, [[0x30, .. State(MigrationMode.CprTransfer)], [0x31, .. State(MigrationMode.CprExec)]], FuzzState);

    [Test]
    public void TranscriptsOfAnyBytesEndWell([Range(1, 10)] int seed) => Each(seed, [[3, .. Transcript()]], FuzzTranscript);

    [Test]
    public void GoodInputIsTaken()
    {
        var given = new List<OwnedFd>();
        using (CprIncoming read = CprState.Parse(State(MigrationMode.CprTransfer), MigrationMode.CprTransfer, _ => Give(given)))
            Assert.That(read.Fds.Select(static f => f.Name), Is.EqualTo(new[] { "m", "d_vfio-user" }));
        using VfioUserTranscript transcript = VfioUserTranscript.Parse(Transcript(), _ => Give(given));
        Assert.That(transcript.Fds, Has.Count.EqualTo(2));
    }

    /// <summary>Over the real socket, descriptors come at wrong places and in wrong numbers. Their name is unique, so that other tests do not count.</summary>
    [Test]
    public async Task AHostileSenderLeavesNoDescriptorBehind([Range(1, 4)] int seed)
    {
        var random = new Random(seed);
        using var folder = new TempDirectory();
        string name = $"cpr-fuzz-{Guid.NewGuid():n}";
        for (int i = 0; i < 10; i++)
        {
            string path = folder[$"cpr{i}"];
            Task<CprTransferReceiver> receiving = Task.Run(() => CprTransferReceiver.Receive(MigrationAddress.Parse($"unix:{path}"), CancellationToken.None));
            Assert.That(SpinWait.SpinUntil(() => File.Exists(path), VmmCommands.Deadline));
            Send(path, name, Damage(State(MigrationMode.CprTransfer), random), random);
            try
            {
                using CprTransferReceiver receiver = await receiving.WaitAsync(VmmCommands.Deadline);
                receiver.Incoming.Dispose();
            }
            catch (VmmException)
            {
                // The receiver refused the state and gave a reason.
            }
        }
        Assert.That(LeakCheck.Descriptors().Where(d => d.Contains(name, StringComparison.Ordinal)), Is.Empty);
    }

    private static void Send(string path, string name, byte[] bytes, Random random)
    {
        using OwnedFd socket = Connect(path);
        using OwnedFd memory = Posix.MemFd(name, 1);
        for (int at = 0; at < bytes.Length;)
        {
            int length = random.Next(1, bytes.Length - at + 1);
            OwnedFd[] fds = [.. Enumerable.Repeat(memory, random.Next(4))];
            int sent = Posix.SendWithFds(socket, bytes.AsSpan(at, length), fds, out _);
            if (sent <= 0) return; // The receiver has refused the state and closed the socket.
            at += sent;
        }
    }

    /// <summary>Repeats a refused connect, because bind creates the path a moment before listen.</summary>
    private static OwnedFd Connect(string path)
    {
        using OwnedFd never = Posix.EventFd();
        while (true)
        {
            OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
            Errno errno = Posix.Connect(socket, Posix.UnixAddress(path), never, 10_000);
            if (errno == Errno.None) return socket;
            socket.Dispose();
            if (errno != Errno.ECONNREFUSED) throw new SocketException((int)errno);
        }
    }

    private static void Each(int seed, byte[][] good, Fuzzed fuzz)
    {
        var random = new Random(seed);
        for (int i = 0; i < Rounds; i++)
        {
            byte[] one = good[i % good.Length];
            fuzz([one[0], .. Damage(one[1..], random)]);
            var noise = new byte[random.Next(200)];
            random.NextBytes(noise);
            fuzz(noise);
        }
    }

    private delegate void Fuzzed(ReadOnlySpan<byte> input);

    /// <summary>Changes some bytes, and removes or doubles others.</summary>
    private static byte[] Damage(byte[] good, Random random)
    {
        byte[] bytes = [.. good];
        for (int n = random.Next(0, 4); n > 0; n--) bytes[random.Next(bytes.Length)] = random.Next(3) == 0 ? byte.MaxValue : (byte)random.Next(256);
        int at = random.Next(bytes.Length + 1);
        return random.Next(4) switch { 0 => bytes[..at], 1 => [.. bytes[..at], .. bytes[(at / 2)..]], _ => bytes };
    }

    private static byte[] State(MigrationMode mode)
    {
        using OwnedFd fd = Posix.EventFd();
        CprFd[] fds = [new("m", 0, fd), new("d_vfio-user", 2, fd)];
        CprIommufdDevice[] devices = [new("0000:00:01.0", 1, 2, 3)];
        return mode == MigrationMode.CprExec ? CprState.ToBytes(fds, devices) : [.. CprState.ToParts(fds, devices).SelectMany(static p => p.Bytes)];
    }

    private static byte[] Transcript()
    {
        using OwnedFd fd = Posix.EventFd();
        using var transcript = new VfioUserTranscript([1, 2, 3, 4]);
        transcript.Record(VfioUserCommand.DeviceGetInfo, [1, 2, 3], Errno.None, [4, 5], [fd]);
        transcript.Record(VfioUserCommand.DeviceGetRegionInfo, [6], Errno.EINVAL, [], []);
        transcript.Record(VfioUserCommand.DeviceGetRegionInfo, [7], Errno.None, [8, 9], [fd]);
        return transcript.ToBytes();
    }

    private static OwnedFd Give(List<OwnedFd> given)
    {
        OwnedFd fd = Posix.EventFd();
        given.Add(fd);
        return fd;
    }
}
