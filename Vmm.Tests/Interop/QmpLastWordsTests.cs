using System.Text;
using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Core.RunStates;
using Vmm.Migration.Qmp;
using Vmm.Tests.Support;

namespace Vmm.Tests.Interop;

/// <summary>What a client sends before it leaves is done, as with <c>printf ... | nc -U</c>. QEMU 11.1 is asked the same.</summary>
[TestFixture]
[Category(QemuVersions.Category)]
internal sealed class QmpLastWordsTests
{
    private const int Rounds = 20, DeadlineMs = 20_000;

    private static readonly byte[] s_words = Encoding.ASCII.GetBytes(
        "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-name\"}\n{\"execute\":\"query-status\"}\n{\"execute\":\"stop\"}\n");

    [Test]
    public void ACommandThatIsPipedAndHalfClosedIsDoneHereAndInQemu()
    {
        using var folder = new TempDirectory();
        using TestVm vm = TestVm.WithRam(1 << 20);
        using var server = new QmpServer(vm.Vm, vm.Engine);
        server.Listen(folder["ours"]);
        using var qemu = new QemuProcess("11.1", 0, "m", "-S", "-qmp", $"unix:{folder["theirs"]},server=on,wait=off");
        int oursLost = 0, theirsLost = 0;
        for (int i = 0; i < Rounds; i++)
        {
            vm.Vm.Cont();
            string answers = Say(folder["ours"]);
            if (vm.Vm.RunState.State != RunState.Paused || !answers.EndsWith("{\"return\": {}}\r\n", StringComparison.Ordinal)) oursLost++;
            qemu.Run("cont");
            Say(folder["theirs"]);
            if (qemu.Run("query-status")!["status"]!.ToString() != "paused") theirsLost++;
        }
        Assert.That((oursLost, theirsLost), Is.EqualTo((0, 0)), "commands lost, here and in QEMU");
    }

    /// <summary>Sends the words, closes the writing side, and reads to the end.</summary>
    private static string Say(string path)
    {
        using OwnedFd socket = Posix.Socket(Posix.AF_UNIX);
        Assert.That(Posix.Connect(socket, Posix.UnixAddress(path), null, DeadlineMs), Is.EqualTo(Errno.None));
        Posix.SendWithFds(socket, s_words, [], out _);
        Posix.ShutdownSocket(socket, Posix.SHUT_WR);
        var answers = new StringBuilder();
        byte[] buffer = new byte[4096];
        while (true)
        {
            if (Posix.Poll(socket, Posix.POLLIN, null, DeadlineMs, out _) == 0) throw new TimeoutException($"'{path}' did not end the session");
            int n = Posix.Receive(socket, buffer, 0, out _);
            if (n <= 0) return answers.ToString();
            answers.Append(Encoding.ASCII.GetString(buffer, 0, n));
        }
    }
}
